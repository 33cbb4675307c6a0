"""Small models, and meshes of at most 8 devices that divide them, for tests of meshes."""

from mea_jax.checkpoint.layerwise import Writer
from mea_jax.data.tokenizers import BytesTokenizer
from tests.helpers import GROUPED, PLAIN, flat, params_of

EXPERTS = {"n_experts": 8, "experts_per_token": 2, "d_expert": 16}
HALF = {"key_components": 2, "value_components": 2}
MODELS = {
    "MHA": PLAIN,
    "GQA": PLAIN | GROUPED,
    "MEA, half of the heads cached": HALF,
    "mixture of experts": PLAIN | EXPERTS,
}
MESHES = {
    "MHA": ("tensor=4", "data=2,fsdp=2,tensor=2"),
    "GQA": ("tensor=4", "fsdp=4"),
    "MEA, half of the heads cached": ("tensor=2", "fsdp=2,tensor=2"),
    "mixture of experts": ("tensor=2", "expert=4,tensor=2"),
}
# Meshes that do not fit the model "GQA" or 8 devices, each with words of its message.
WRONG = (
    ("tensor=8", "config.mesh.tensor=8 does not divide config.model.n_kv_heads=4"),
    ("expert=2", "config.mesh.expert=2 splits experts"),
    ("tensor=16", "needs 16 devices, but this machine has 8"),
    ("tensr=2", "did you mean 'tensor'?"),
    ("tensor=0", "the size of tensor must be 1 or more"),
    ("tensor", "the size of tensor must be 1 or more"),
)


def written_run(name, tiny, folder):
    """Write a checkpoint of the model `name` with random parameters; return its run directory."""
    config, run = (
        tiny(**{f"model.{key}": value for key, value in MODELS[name].items()}),
        folder / "run",
    )
    writer = Writer(folder / "arrays", config.model)
    for path, leaf in flat(params_of(config.model, noise=0.3)).items():
        writer.open(tuple(path.split("/")))[...] = leaf
    writer.save(run / "checkpoints" / "0", config, digest="")
    (run / "tokenizer").mkdir()
    BytesTokenizer().save(run / "tokenizer")
    return run
