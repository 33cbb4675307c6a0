"""Tests of the study of a pretrained model: its stages, rows and page, and the committed ones."""

import importlib.util
import json
import re

import pytest

from mea_jax.errors import UserError
from mea_jax.train.run import train
from studies import real_model_rows, real_models, real_models_figure, real_models_page
from studies.real_models import Study
from studies.stages import FinishedStages
from tests.helpers import PLAIN, assert_one_error
from tests.paths import ROOT

ROWS = ROOT / "docs" / "studies" / "real_models"
PAGE = ROOT / "docs" / "studies" / "real_models.md"
CONFIG = ROOT / "configs" / "studies" / "smollm2_cache.py"
EMPTY = "".join(f"<!-- {n} -->\n<!-- end of {n} -->\n" for n in ("losses", "tasks", "texts"))


def committed():
    spec = importlib.util.spec_from_file_location("smollm2_cache", CONFIG)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().to_dict()


def small(**changes):
    """Return the committed config with tiny counts and two rows and a format, without tasks."""
    rows = {
        "bits_50": {"method": "bits", "keep": 0.5},
        "half": {"method": "aligned", "keep": 0.5, "repair": "layerwise", "repair_steps": 2},
        "int4_g32": {"format": "int4_g32"},
    }
    config = committed() | {
        "calibration_texts": ("own",),
        "held_out_texts": ("other", "more"),
        "calibration_tokens": 512,
        "measure_tokens": 256,
        "held_out_tokens": 1024,
        "rows": rows,
        "order": tuple(rows),
        "tasks": (),
        "task_rows": ("original", "half"),
        "prompts": ("a quick", "the lazy"),
        "new_tokens": 4,
    }
    return config | changes


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    wide = PLAIN | {"n_kv_heads": 2, "head_dim": 32}
    train(tiny(steps=8, **{f"model.{name}": value for name, value in wide.items()}), workdir)
    return workdir


@pytest.fixture(scope="module")
def texts(corpus, tmp_path_factory):
    """Return three texts by name; two of them consist of all words of the third, in reverse."""
    found = {"own": f"text:{corpus}"}
    for name, files in (("other", "0*.txt"), ("more", "1*.txt")):
        folder = tmp_path_factory.mktemp(name)
        for file in corpus.glob(files):
            (folder / file.name).write_text(" ".join(reversed(file.read_text().split() * 4)))
        found[name] = f"text:{folder}"
    return found


class Commands:
    """Run each command in this process and record it; call number `fails` fails."""

    def __init__(self, in_process, fails=None):
        self.in_process, self.fails, self.called = in_process, fails, []

    def __call__(self, command):
        self.called.append(command[2])
        if len(self.called) == self.fails:
            return 3
        status, _, err = self.in_process(command[2], *command[3:])
        assert status == 0, err
        return status


def quiet(line):
    pass


@pytest.mark.slow
def test_rows_are_resumed_and_become_a_page(model, texts, tmp_path, in_process):
    """A failed stage is repeated, finished ones are not; the tables have the numbers of the JSON.

    An option or a prompt that changed is refused with its name.
    """
    config, out = small(), tmp_path / "out"
    real_models.check(config)
    study = Study(config, str(model), out, texts)
    with pytest.raises(UserError, match="stage 'int4_g32' failed with status 3"):
        real_models.run(study, quiet, Commands(in_process, fails=3))
    assert sorted(f.stem for f in (out / "rows").iterdir()) == ["bits_50", "half", "original"]
    again = Commands(in_process)
    real_models.run(study, quiet, again)
    assert again.called == ["studies.cache_formats", "mea_jax.generate", "mea_jax.generate"]
    last = Commands(in_process)
    real_models.run(study, quiet, last)
    assert last.called == []
    assert [folder.name for folder in (out / "models").iterdir()] == ["half"]

    rows = {row["name"]: row for row in real_model_rows.read(out / "rows")}
    assert rows["bits_50"]["kept"] <= 0.5 < rows["original"]["kept"] == 1
    assert list(rows["half"]["texts"]) == ["other", "more"]
    assert rows["half"]["repair_tokens"] == 512
    assert rows["half"]["divergence"] > 0
    means = [of["increase"] for of in rows["half"]["texts"].values()]
    assert rows["half"]["increase"] == pytest.approx(sum(means) / 2, abs=1e-6)
    assert not re.search(re.escape(str(tmp_path.parent)), json.dumps(rows)), "a path in a row"
    check_page(list(rows.values()), tmp_path, in_process, out / "rows")

    other = Study(small(prompts=("a slow",)), str(model), out, texts)
    with pytest.raises(UserError, match=r"config\.prompts differs from .*continued already"):
        real_models.run(other, quiet, last)
    changed = small(rows=config["rows"] | {"bits_50": {"method": "bits", "keep": 0.25}})
    with pytest.raises(UserError, match=r"bits_50 with other options \(--keep=0.25, --keep=0.5\)"):
        real_models.run(Study(changed, str(model), out, texts), quiet, last)


def check_page(rows, tmp_path, in_process, folder):
    page, figure = tmp_path / "page.md", tmp_path / "figures" / "losses.png"
    page.write_text(f"# Title\n\nBefore\n{EMPTY}After\n")
    words = [f"--rows={folder}", f"--out={page}", f"--figure={figure}"]
    for _ in range(2):  # the second time, it replaces the tables
        status, _, err = in_process("studies.real_models_page", *words)
        assert status == 0, err
        text = page.read_text()
        assert text.startswith("# Title\n\nBefore\n")
        assert text.endswith("After\n")
        assert "(figures/losses.png)" in text
        cells = {line.split(" | ")[0]: line.split(" | ") for line in losses_lines(text)}
        assert len(cells) == len(rows)
        for row in rows:
            own = cells[f"| `{row['name']}`"]
            assert own[2:4] == [f"{row['bytes']:,.0f}", f"{row['kept']:.1%}"]
            if row["name"] != "original":
                increases = [of["increase"] for of in row["texts"].values()] + [row["increase"]]
                shown = [f"{increase:+.4f}" for increase in increases]
                assert [cell.split(" ±")[0] for cell in own[4:7]] == shown
                assert own[7].startswith(f"{row['divergence']:.4f}")
    assert figure.stat().st_size > 10_000
    assert text.count("| `half` |") == 3  # losses, and two prompts


def losses_lines(text):
    table = text.partition("<!-- losses -->")[2].partition("<!-- end of losses -->")[0]
    return [line for line in table.splitlines() if line.startswith("| `")]


def test_a_row_that_was_finished_before_its_stage_was_recorded(tmp_path):
    """A compression whose study was killed is collected, not repeated; not one of other options."""
    study = Study(small(), "RUN", tmp_path, dict.fromkeys(("own", "other", "more"), "text:a"))
    stage = next(study.stages())
    done = FinishedStages(tmp_path)
    done.begin(stage)
    assert not done.has_result(stage)
    (tmp_path / "models" / "bits_50").mkdir(parents=True)
    assert FinishedStages(tmp_path).has_result(stage)
    other = small(rows=small()["rows"] | {"bits_50": {"method": "bits", "keep": 0.25}})
    changed = next(Study(other, "RUN", tmp_path, study.texts).stages())
    with pytest.raises(UserError, match="other options"):
        FinishedStages(tmp_path).has_result(changed)


@pytest.mark.slow
def test_control_and_tasks(model, texts, tmp_path, in_process):
    """The control has the steps of a joint repair; differences of tasks are paired by document.

    The original's tasks are run first, once.
    """
    pytest.importorskip("lm_eval")
    suite, rows = (
        tmp_path / "suite",
        {"half": {"method": "svd", "keep": 0.5}, "control": {"control": 512}},
    )
    status, _, err = in_process("studies.harness_suite", f"--out={suite}", "--documents=8")
    assert status == 0, err
    config = small(
        rows=rows, order=tuple(rows), tasks=("mea_recall",), task_rows=("control",), prompts=()
    )
    real_models.check(config)
    call = Commands(in_process)
    real_models.run(Study(config, str(model), tmp_path / "out", texts, str(suite)), quiet, call)
    assert call.called == ["mea_jax.compress", "studies.control", *["mea_jax.evaluate"] * 2]
    found = {row["name"]: row for row in real_model_rows.read(tmp_path / "out" / "rows")}
    control = found["control"]
    assert (control["kept"], control["repair_tokens"]) == (1.0, 4096)  # a step of joint repair
    assert control["divergence"] > 0
    (before,), (after,) = found["original"]["tasks"], control["tasks"]
    assert after["difference"] == after["value"] - before["value"]
    assert after["difference_error"] is not None
    table = real_models_page.tasks_table(real_models_page.ordered(list(found.values())))
    assert f"| `control` | 100.0% | {after['value']:.4f} ±" in table
    assert "`half`" not in table


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keeps": 1}, "unknown config key config.keeps"),
        ({"tasks": "piqa"}, "config.tasks='piqa' has the wrong type"),
        ({"rows": {"a": {"kep": 0.5}}}, "config.rows.a has the unknown key 'kep': did you mean"),
        ({"rows": {"a": {"format": "int4"}}}, "config.rows.a.format='int4': did you mean"),
        ({"rows": {"a": {"format": "kivi2", "keep": 1}}}, "unknown key 'keep': known: format"),
        ({"rows": {"a": {"control": 0}}}, "config.rows.a.control=0 must be 1 token or more"),
        ({"rows": {"a": {"method": "bit"}}}, "config.rows.a.method='bit': did you mean 'bits'"),
        ({"rows": {"a": {"method": "bits", "keep": 0.7}}}, "config.rows.a: --keep=0.7 with"),
        ({"rows": {"original": {}}}, "config.rows.original is reserved"),
        ({"order": ("bits_50", "half")}, "differing are int4_g32"),
        ({"task_rows": ("hal",)}, "names the unknown row 'hal': did you mean 'half'"),
        ({"task_rows": ("int4_g32",)}, "'int4_g32', a number format, which has no checkpoint"),
    ],
)
def test_what_is_refused_by_name(changes, words):
    with pytest.raises(UserError) as refused:
        real_models.check(small(**changes))
    assert words in str(refused.value)


def test_texts_of_the_command_line_are_those_of_the_config(tmp_path, in_process):
    config = small()
    words = ["own=text:a", "other=jsonl:b", "more=python_stdlib"]
    assert real_models.texts_of(words, config)["more"] == "python_stdlib"
    for given, refused in (
        (words[:2], "lacks more: add more=KIND:PATH"),
        ([*words, "odd=text:a"], "names odd, which the config does not"),
        (["own"], "--texts own must have the form NAME=KIND:PATH"),
    ):
        with pytest.raises(UserError, match=refused):
            real_models.texts_of(given, config)
    command = [f"--config={CONFIG}", "--checkpoint=RUN", f"--out={tmp_path}"]
    names = committed()["calibration_texts"] + committed()["held_out_texts"]
    texts = "--texts=" + ",".join(f"{name}=text:{name}" for name in names)
    status, printed, err = in_process("studies.real_models", *command, texts, "--list")
    assert status == 0, err
    assert len(printed.splitlines()) == len(committed()["rows"]) + 2 * len(committed()["task_rows"])
    assert "python -m mea_jax.compress --checkpoint RUN --measurements" in printed
    status, _, err = in_process("studies.real_models", *command, "--list")
    assert_one_error(status, err, "--texts lacks web, encyclopedia, web_later")


def row(name, kept, increase, **more):
    """Return a row of bits with one text, `t`."""
    losses = {"increase": increase, "error": 0.01, "divergence": 0.02, "divergence_error": None}
    return {
        "name": name, "kind": "compress", "options": {"method": "bits", "keep": kept},
        "bytes": 100, "kept": kept, "texts": {"t": losses | {"before": 2.0, "after": 2.1}},
        "repair_tokens": 0, "seconds": 1.0, **losses, **more,
    }  # fmt: skip


def test_values_without_a_logarithm_are_on_a_line_at_the_bottom(tmp_path):
    assert real_models_figure.floor_of([0.3, -1.0, 0.03]) == pytest.approx(0.01)
    assert real_models_figure.floor_of([-1.0]) > 0
    found = [row("a", 0.5, -0.001), row("b", 0.25, 0.02), row("c", 0.125, 0.2, error=None)]
    real_models_figure.draw([("bits", one) for one in found], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_labels_and_order_of_rows():
    joint = {"method": "bits", "keep": 0.25, "budget": "measured", "repair": "joint"}
    found = [
        row("kivi2", 0.2, 0.1, kind="format", options={"format": "kivi2"}),
        row("small", 0.125, 0.1),
        row("joint", 0.25, 0.1, options=joint),
        row("large", 0.5, 0.1),
    ]
    assert [one["name"] for one in real_models_page.ordered(found)] == [
        "large", "small", "joint", "kivi2",
    ]  # fmt: skip
    assert real_models_page.line_of(found[0]) == "KIVI"
    assert real_models_page.line_of(found[2]) == "bits, measured, joint repair"


def test_texts_of_models_are_shown_literally():
    prompts = [{"prompt": "def f():\n", "text": "a | <b> *c*\nd"}]
    table = real_models_page.texts_table([row("a", 0.5, 0.1, prompts=prompts)])
    assert table.splitlines()[-1] == ("| def f(): | `a` | a &#124; &lt;b&gt; &#42;c&#42;<br>d |")


def test_a_page_without_markers_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no markers <!-- tasks -->"):
        real_models_page.spliced(EMPTY.replace("tasks", "task"), {"tasks": ""}, tmp_path)
    with pytest.raises(UserError, match="has no rows"):
        real_models_page.read_rows([tmp_path])


def test_the_committed_page_is_that_of_its_rows():
    """Every row is one of the config's; the page's tables are what the rows give."""
    rows = real_models_page.read_rows([ROWS]) if ROWS.exists() else []
    known = {"original", *committed()["rows"]}
    assert {one["name"] for one in rows} <= known
    text = PAGE.read_text()
    if rows:
        found = real_models_page.sections(rows, "real_models.png")
        assert PAGE.with_suffix(".png").exists()
    else:
        found = {"losses": "", "tasks": "", "texts": ""}
    assert real_models_page.spliced(text, found, PAGE) == text


def test_the_committed_config_is_valid():
    config = committed()
    real_models.check(config)
    assert len(config["rows"]) == 27
    joint = config["rows"]["bits_joint_25"]
    assert config["rows"]["control"]["control"] == joint["repair_tokens"]
