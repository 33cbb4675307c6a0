"""Commands as a user runs them: no library speaks on the screen, only the commands themselves."""

import os
import re
import subprocess
import sys

import pytest

# Python's warnings, absl's and XLA's log lines, and tracebacks that a thread prints by itself.
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
    """`screen(module, *arguments)`: what a command of its own process prints, both streams."""
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
    """What the training of a tiny quickstart on `corpus` printed; its run is `runs/quickstart`."""
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
    assert "\r" not in text, "a progress bar was drawn into a file"
