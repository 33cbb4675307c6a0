"""python -m mea_jax.convert: user errors, killed conversions, files copied with a model."""

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mea_jax.checkpoint import lock
from mea_jax.checkpoint.layerwise import StoredModel, Writer
from mea_jax.checkpoint.load import load
from mea_jax.checkpoint.manager import Checkpoints
from mea_jax.config import schema as configs
from mea_jax.convert import config_reading, config_writing, exporting, folders, importing, shards
from mea_jax.convert.exporting import export_model
from mea_jax.convert.importing import import_model
from mea_jax.data import end_tokens, tokenizers
from mea_jax.parallel import sharding
from mea_jax.train.run import train
from mea_jax.train.warm_start import Start
from tests.helpers import PLAIN, apply_logits, assert_equal, assert_one_error, params_of
from tests.system.convert import small_models
from tests.system.convert.spoilt_models import BAD, REFUSED, SHARD, spoilt


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Save a Llama in three shards; return its folder."""
    model = small_models.make("llama", num_hidden_layers=1)
    folder = small_models.save(model, tmp_path_factory.mktemp("llama"), max_shard_size="60KB")
    assert (folder / SHARD).exists()
    return folder


@pytest.fixture(scope="module")
def imported(original, corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "llama"
    import_model(original, run, text=f"text:{corpus}", context_length=32)
    return run


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


@pytest.fixture
def shell(in_process):
    """Return `shell(*arguments)`, which runs the command in this process: (status, out, err)."""
    return functools.partial(in_process, "mea_jax.convert")


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_model_gets_one_line_and_leaves_nothing(kind, copy, shell, tmp_path):
    spoil, words = BAD[kind]
    spoil(copy)
    status, _, err = shell("from_hf", "--model", copy, "--out", tmp_path / "run")
    assert_one_error(status, err, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize("key", REFUSED)
def test_what_a_config_asks_for_and_we_do_not_compute_is_named(key, original):
    config = config_reading.read_config(original) | {key: REFUSED[key]}
    word = "rope_type" if key == "rope_parameters" else key
    with pytest.raises(importing.UserError, match=rf"^here: {word}=") as caught:
        config_reading.model_config(config, "here")
    assert "\n" not in str(caught.value)


def test_numbers_beyond_bfloat16_are_refused_by_name(copy, shell, tmp_path):
    spoilt(np.finfo(np.float32).max)(copy)
    arguments = ("from_hf", "--model", copy, "--out", tmp_path / "run")
    status, _, err = shell(*arguments, "--dtype", "bfloat16")
    assert_one_error(status, err, "model.layers.0.", "3.4e+38, beyond the range of bfloat16")
    assert not (tmp_path / "run").exists()
    assert shell(*arguments)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["give --model FOLDER and --out RUN"]),
        (["--model", "nowhere", "--out", "x"], ["--model nowhere: no such folder"]),
        (["--model", "nobody/nothing", "--out", "x"], ["cannot be downloaded from the hub"]),
        (["--model", "MODEL", "--out", "x", "--dtype", "float64"], ["--dtype=float64"]),
        (["--model", "MODEL", "--out", "x", "--context_length", "300"], ["beyond the model's"]),
        (["--model", "MODEL", "--out", "x", "--text", "tekst:x"], ["--text tekst:x", "text"]),
    ],
)
def test_mistakes_of_from_hf(arguments, words, original, shell, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    filled = [str(original) if word == "MODEL" else word for word in arguments]
    assert_one_error(*shell("from_hf", *filled)[::2], *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_an_output_that_exists_is_kept(command, original, imported, shell, tmp_path):
    given = ("--model", original) if command == "from_hf" else ("--checkpoint", imported)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert_one_error(
        *shell(command, *given, "--out", tmp_path / "out")[::2], "exists: choose another"
    )
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "mine").write_text("x")
    assert_one_error(
        *shell(command, *given, "--out", tmp_path / "new")[::2], "new.part is in the way"
    )
    assert [p.name for p in tmp_path.rglob("mine")] == ["mine", "mine"]


def test_two_processes_do_not_write_one_output(tmp_path):
    refused = pytest.raises(importing.UserError, match="another process is writing")
    with folders.atomic_folder(tmp_path / "out"), refused, folders.atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").is_dir()


class Killed(BaseException):
    """An exception in place of a kill: no handler of the package may catch it."""


@pytest.mark.parametrize("stage", ["_fill", "Writer.save", "write_json"])
def test_an_import_that_was_killed_begins_anew(stage, original, tmp_path, monkeypatch):
    def dies(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"mea_jax.convert.importing.{stage}", dies)
        with pytest.raises(Killed):
            import_model(original, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "run.part").exists()
    import_model(original, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert Checkpoints(tmp_path / "run").damage(0) is None


def test_an_export_that_was_killed_is_no_model(imported, tmp_path, monkeypatch):
    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(exporting.tokenizer_files, "write", dies)
        with pytest.raises(Killed):
            export_model(imported, tmp_path / "out", print)
    assert not (tmp_path / "out").exists()
    export_model(imported, tmp_path / "out", print)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_without_room_is_refused_before_it_is_filled(original, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(importing.UserError, match="the conversion needs"):
        import_model(original, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_both_ways_of_storing_experts_are_read(tmp_path, devices):
    """Models are published with a tensor per expert; transformers 5 has all experts in one."""
    devices(1)
    model = small_models.make("qwen3_moe", num_hidden_layers=1)
    folder = small_models.save(model, tmp_path / "apart")
    fused = shutil.copytree(folder, tmp_path / "fused")
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    save_file(state, fused / shards.SINGLE)
    for source in (folder, fused):
        import_model(source, tmp_path / f"{source.name}_run")
    one, other = (StoredModel(tmp_path / f"{name}_run", print) for name in ("apart", "fused"))
    assert_equal(one.layer(0), other.layer(0))


def test_a_head_beside_a_tied_embedding_must_be_it(tmp_path):
    model = small_models.make("llama tied", num_hidden_layers=1)
    folder = small_models.save(model, tmp_path / "model")
    tensors = load_file(folder / shards.SINGLE)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    save_file(tensors | head, folder / shards.SINGLE)
    import_model(folder, tmp_path / "same")
    save_file(tensors | {"lm_head.weight": -head["lm_head.weight"]}, folder / shards.SINGLE)
    with pytest.raises(importing.UserError, match=r"lm_head\.weight is not the embedding"):
        import_model(folder, tmp_path / "other")


def test_a_rope_as_transformers_4_writes_it():
    new = small_models.make("llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    rope = new.pop("rope_parameters")
    old = new | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    found = config_reading.model_config(old, "")
    assert found == config_reading.model_config(new | {"rope_parameters": small_models.LLAMA3}, "")
    assert found.rope_scaling == configs.RopeScaling("llama3", 8.0, 1.0, 4.0, 16)


def test_an_import_names_the_limit_of_dynamic_scaling(shell, corpus, tmp_path):
    folder = small_models.save(small_models.make("llama dynamic"), tmp_path / "model")
    arguments = (
        "from_hf",
        "--model",
        folder,
        "--text",
        f"text:{corpus}",
        "--out",
        tmp_path / "run",
    )
    status, _, err = shell(*arguments, "--context_length", 65)
    assert_one_error(status, err, "--context_length 65", "max_position_embeddings=64")
    status, out, err = shell(*arguments)
    assert status == 0, err
    assert re.search("limit +64 positions, .*original_context, beyond which the frequencies", out)


# -- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--form", "stok"], ["--form=stok", "stock"]),
        (["--dtype", "int8"], ["--dtype=int8"]),
        (["--shard_size", "5 apples"], ["--shard_size=5 apples"]),
        (["--checkpoint", "nowhere"], ["nowhere: no such folder"]),
    ],
)
def test_mistakes_of_to_hf(arguments, words, imported, shell, tmp_path):
    given = ("--checkpoint", imported, "--out", tmp_path / "out")
    assert_one_error(*shell("to_hf", *given, *arguments)[::2], *words)
    assert not list(tmp_path.iterdir())


def test_a_model_that_no_class_holds_is_refused_by_what_it_has(imported, tmp_path, monkeypatch):
    own = StoredModel(imported, print).config.model
    for change, words in (
        ({"head_norm": True}, "head_norm"),
        ({"gate": "head"}, "gate='head'"),
        ({"positions": "alibi"}, "positions='alibi'"),
        ({"d_model": 30}, "d_model=30"),
    ):
        model = configs.dataclasses.replace(own, **change)
        with pytest.raises(importing.UserError, match=words):
            config_writing.stock_family(model)
        assert exporting.choose_form(model, "auto") == "mea"


def test_the_tokenizer_and_its_companions_travel_through(copy, tmp_path, devices):
    devices(1)
    kept = {
        "tokenizer_config.json": b'{"eos_token": "<|endoftext|>"}',
        "chat_template.jinja": b"{{ messages }}",
        "generation_config.json": b'{"eos_token_id": [256, 7]}',
    }
    for name, content in kept.items():
        (copy / name).write_bytes(content)
    import_model(copy, tmp_path / "run")
    assert tokenizers.from_directory(tmp_path / "run" / "tokenizer").stops == (0, 256, 7)
    export_model(tmp_path / "run", tmp_path / "out", print)
    for name in (*kept, "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (copy / name).read_bytes(), name
    assert not (tmp_path / "out" / end_tokens.MODEL_CONFIG).exists()


def made_here(config, folder):
    """Write a run directory as training does, with random parameters."""
    params = jax.tree.map(np.asarray, params_of(config.model, noise=0.1))
    writer = Writer(folder.with_name("arrays"), config.model)
    writer.write_non_layer({k: v for k, v in params.items() if not k.startswith("layers_")})
    for index in range(config.model.n_layers):
        writer.write_layer(index, jax.tree.map(lambda x, i=index: x[i], params["layers_0"]))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    tokenizers.BytesTokenizer().save(folder / "tokenizer")
    writer.save(folder / "checkpoints" / "8", config, "of its data")


def test_a_model_trained_here_gets_a_tokenizer_that_transformers_reads(tiny, tmp_path):
    """The byte tokenizer, which the library lacks, is exported as one that gives the same ids."""
    made_here(tiny(**{f"model.{name}": value for name, value in PLAIN.items()}), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", print)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = tokenizers.BytesTokenizer()
    text = "def f(x):\n\treturn 'naïve 東京 \U0001f642'  # \x00\x7f\xa0\xad"
    assert theirs(text)["input_ids"] == [ours.separator, *ours.encode_batch([text])[0]]
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert theirs.eos_token_id == ours.separator
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.eos_token_id == 256


def test_our_model_through_theirs_is_itself(tiny, tmp_path):
    """Export and import give the same parameters and the same model config."""
    gqa = PLAIN | {"n_kv_heads": 2, "qk_norm": True}
    made_here(tiny(**{f"model.{name}": value for name, value in gqa.items()}), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", print)
    import_model(tmp_path / "out", tmp_path / "again")
    first, second = (StoredModel(tmp_path / name, print) for name in ("run", "again"))
    assert_equal(first.top(), second.top())
    assert_equal(first.layer(1), second.layer(1))
    a, b = (configs.flatten(one.config.to_dict()["model"]) for one in (first, second))
    assert {k for k in a if a[k] != b[k]} <= {"attention_kernel", "loss_chunk", "backend"}


def test_a_mixed_model_keeps_its_component_heads_or_rebuilds_composite_ones(tiny, tmp_path):
    mixed = {"model.head_norm": False, "model.key_components": 2}
    made_here(tiny(**mixed), tmp_path / "run")
    own = export_model(tmp_path / "run", tmp_path / "own", print)
    stock = export_model(tmp_path / "run", tmp_path / "stock", print, form="stock")
    assert (own["form"], stock["class"]) == ("mea", "LlamaForCausalLM")
    tokens_BT = small_models.tokens(5, 2, 24)
    found = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        for name in ("own", "stock")
    ]
    a, b = (small_models.logits(model.eval(), tokens_BT) for model in found)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    config, params, _, _ = load(tmp_path / "run", dtype="float32")
    natural_BT = np.broadcast_to(np.arange(24, dtype=np.int32), tokens_BT.shape)
    ours = apply_logits(
        config, params, *map(jnp.asarray, (tokens_BT, natural_BT, natural_BT * 0 + 1))
    )
    np.testing.assert_allclose(a, ours, rtol=0, atol=1e-4)


def test_parameters_of_every_path_have_their_tensor():
    """The tensors of transformers contain as many numbers as our parameters."""
    for kind in small_models.KINDS:
        config = small_models.make(kind).config.to_dict()
        config |= {"architectures": [small_models.KINDS[kind].model.__name__]}
        model = configs.dataclasses.replace(config_reading.model_config(config, ""), backend="xla")
        entries = importing.tensors.entries(model)
        ours = sum(x.size for x in jax.tree.leaves(params_of(model)))
        assert sum(int(np.prod(entry.hf_shape)) for entry in entries) == ours


def test_no_run_is_started_in_an_imported_folder(imported, devices):
    """Such a run would start from new parameters, next to the imported ones."""
    devices(1)
    before = sorted(path.name for path in imported.rglob("*") if path.name != lock.FILE)
    expected = r"configs/recover\.py:.*llama and another --workdir"
    with pytest.raises(importing.UserError, match=expected):
        train(StoredModel(imported, print).config, imported)  # as with --workdir alone
    after = sorted(path.name for path in imported.rglob("*") if path.name != lock.FILE)
    assert before == after


def test_a_run_that_starts_from_an_import_keeps_what_came_with_the_tokenizer(
    tiny, imported, tmp_path, devices
):
    mesh = sharding.make_mesh(configs.MeshConfig(1, 1, 1), devices(1))
    start = Start(tiny(**{"start.checkpoint": str(imported)}), mesh, print)
    own = tokenizers.from_directory(imported / "tokenizer")
    own.companions = {}  # as in prepared data
    assert end_tokens.MODEL_CONFIG in start.tokenizer(own).companions
