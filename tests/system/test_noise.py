"""Commands print only their own lines: no warnings, log lines or tracebacks of libraries."""

import os
import re
import subprocess
import sys

import pytest

# Warnings of Python, log lines of absl and XLA, and tracebacks that threads print.
NOISE = re.compile(
    r"warning|deprecat|traceback|^[IWEF]\d{4} |^(WARNING|ERROR):|was never awaited|leaked",
    re.IGNORECASE | re.MULTILINE,
)
TRAIN = (
    "--config.steps=4",
    "--config.batch_size=8",
    "--config.optimizer.warmup_steps=2",
    "--config.model.n_layers=2",
    "--config.model.d_model=64",
    "--config.model.hlc=none",
    "--config.model.head_norm=False",
    "--config.model.vocab_size=300",
    "--config.data.tokenizer=bpe:300",
    "--config.data.context_length=64",
    "--config.data.held_out_fraction=0.2",
    "--config.evaluate.every=2",
    "--config.evaluate.sample_tokens=4",
)


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """Return `screen(module, *arguments)`, which runs a command: its stdout and stderr, joined."""
    folder = tmp_path_factory.mktemp("noise")
    # One device, and warnings as Python shows them by default.
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONWARNINGS")}

    def run(module, *arguments):
        words = [sys.executable, "-m", f"mea_jax.{module}", *map(str, arguments)]
        done = subprocess.run(words, capture_output=True, cwd=folder, env=kept)
        text = (done.stdout + done.stderr).decode()  # not text=True, which loses "\r"
        assert done.returncode == 0, text
        return text

    return run


@pytest.fixture(scope="module")
def trained(screen, corpus):
    """Train a tiny quickstart on `corpus` in `runs/quickstart`; return what the command printed."""
    source = f"({{'source': 'text', 'path': '{corpus}'}},)"
    config = os.path.abspath("configs/quickstart.py")
    return screen("train", f"--config={config}", f"--config.data.sources={source}", *TRAIN)


def test_training_is_quiet(trained):
    assert not NOISE.findall(trained), trained


def test_commands_on_a_checkpoint_are_quiet(trained, screen):
    run, half = ("--checkpoint", "runs/quickstart"), ("--checkpoint", "runs/half")
    tokens = ("--calibration_tokens", 512, "--held_out_tokens", 512)
    printed = [
        screen("generate", *run, "--prompt", "a quick", "--max_tokens", 4),
        screen("compress", *run, "--out", "runs/half", *tokens),
        screen("evaluate", *run, *half, "--parts", "loss", "--out", "profile"),
        screen("convert", "to_hf", *half, "--out", "exported/half"),
        screen("convert", "to_hf", *run, "--out", "exported/whole"),
        screen("convert", "from_hf", "--model", "exported/whole", "--out", "runs/back"),
    ]
    text = "\n".join(printed)
    assert not NOISE.findall(text), text
    assert "\r" not in text, "a progress bar was printed to a file"
