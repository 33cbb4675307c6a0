"""Read llama.cpp's GGUF files: their metadata as a config.json, their tensors in float32.

The `gguf` package of llama.cpp (extra `gguf`) parses the format and dequantises the tensors; only
one tensor is in memory at a time. Names and shapes become those of transformers, so that the rest
of an import is the same for both formats. A model of several files is read from its first one.

llama.cpp stores the rotary features of some architectures in pairs, (x_0, y_0, x_1, y_1, ..), where
transformers stores halves, (x_0, x_1, .., y_0, y_1, ..). The query and key projections of these are
permuted.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mea_jax.config.schema import RopeScaling
from mea_jax.convert.gguf_reading import check_type, read, require_gguf
from mea_jax.data.bad_input import first_line
from mea_jax.errors import UserError, nearest, shown
from mea_jax.ops.rope import rope_frequencies

# By GGUF architecture: class and model type of transformers, and whether rotary pairs are adjacent.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama", True),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", False),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", False),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3", True),
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# Llama 3.1 and later: a GGUF file has the factors of the frequencies, not what they come from.
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_BETAS = ("beta_fast", "beta_slow")
# Further numbers of a scaling, of which some act differently in different versions of llama.cpp,
# with the values at which they have no effect.
_NEUTRAL = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file, which is read and dequantised by `array`.

    Attributes:
      name: its GGUF name.
      stored: the reader's tensor.
      where: the file, for messages.
      paired_heads: the number of heads whose rotary features are paired; 0 if they are not.
    """

    name: str
    stored: Any
    where: Path
    paired_heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in transformers, outermost axis first."""
        return tuple(int(n) for n in reversed(self.stored.shape))

    def array(self) -> np.ndarray:
        """Return the tensor in float32; raise `UserError` if its data is unusable."""
        import gguf

        try:
            array = gguf.dequantize(self.stored.data, self.stored.tensor_type).astype(np.float32)
        except Exception as error:  # the library raises several kinds
            raise UserError(
                f"{self.where}: the tensor {self.name} of type {self.stored.tensor_type.name} "
                f"cannot be dequantised ({first_line(error)}); fetch the file again"
            ) from error
        array = array.reshape(self.shape)
        return to_halves(array, self.paired_heads) if self.paired_heads else array


def to_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Return a projection (heads * H, ...) of adjacent rotary pairs as one of halves."""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def stored_name(name: str) -> str:
    """Return the GGUF name of a tensor of transformers; `name` itself if it has none."""
    layer = re.fullmatch(r"(model\.layers\.)(\d+)\.(.+)\.(weight|bias)", name)
    for ours, theirs in (_TOP | _LAYER).items():
        if theirs == name:
            return ours
        if layer is not None and theirs == layer[3]:
            return f"blk.{layer[2]}.{ours}.{layer[4]}"
    return name


def _check_order(files: Mapping[Path, Any]) -> None:
    """Raise `UserError` if a later file is not the part that its name says."""
    for number, (path, reader) in enumerate(files.items()):
        field = reader.fields.get("split.no")
        found = None if field is None else field.contents()
        if number and found != number:
            what = "none of a model in parts" if found is None else f"part {found + 1}"
            raise UserError(
                f"{path} is {what}, and named as part {number + 1} of {len(files)}: fetch it again"
            )


def locate(model: str) -> Path:
    """Return the path of a GGUF file, or of the one that matches PACKAGE/PATTERN.

    Raise `UserError` if there is no such file, or several match.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        listed = f", such as {found[0]}" if found else "; for safetensors use from_hf"
        raise UserError(f"--model {model} is a folder: give a GGUF file{listed}")
    package, _, pattern = model.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() and pattern else None
    if spec is None or spec.origin is None:
        raise UserError(f"--model {model}: no such file; give a GGUF file")
    found = sorted(Path(spec.origin).parent.glob(pattern))
    if len(found) != 1:
        raise UserError(
            f"--model {model} matches {len(found)} files in {Path(spec.origin).parent}: "
            "give the path of one"
        )
    return found[0]


class GGUFModel:
    """A model of one GGUF file, or of several parts.

    Attributes:
      path: the first file.
      fields: its metadata by key.
      architecture: the GGUF name of the architecture, a key of `ARCHITECTURES`.
      tensors: the tensors by their names in transformers.
    """

    def __init__(self, path: Path):
        """Read the metadata. Raise `UserError` if a file is damaged or not supported."""
        self.path = path
        require_gguf(f"--model {path}")
        first = read(path)
        self.fields = {k: v.contents() for k, v in first.fields.items() if k[:5] != "GGUF."}
        parts = self._other_parts()
        self.architecture = self._text("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"{path}: the architecture {self.architecture!r} is not supported; "
                f"{nearest(self.architecture, ARCHITECTURES)}"
            )
        files = {path: first} | {part: read(part) for part in parts}
        _check_order(files)
        self._stored = {t.name: (t, file) for file, r in files.items() for t in r.tensors}
        total = self.fields.get("split.tensors.count")
        if total is not None and total != len(self._stored):
            raise UserError(
                f"{path}: its parts have {len(self._stored)} tensors instead of {total}; "
                "fetch them again"
            )
        self.tensors = dict(self._named())

    def _other_parts(self) -> list[Path]:
        """Return the paths of the other parts, all of which exist."""
        count, number = self.fields.get("split.count", 1), self.fields.get("split.no", 0)
        if count <= 1:
            return []
        name = _PART.fullmatch(self.path.name)
        if name is None or int(name[3]) != count:
            raise UserError(
                f"{self.path} is one of {count} parts, and not named like one: rename it to "
                f"NAME-{number + 1:05d}-of-{count:05d}.gguf, as published"
            )
        parts = [
            self.path.with_name(f"{name[1]}-{i:05d}-of-{count:05d}.gguf")
            for i in range(1, count + 1)
        ]
        if number != 0:
            raise UserError(f"{self.path} is part {number + 1} of {count}: give part 1, {parts[0]}")
        for part in parts[1:]:
            if not part.is_file():
                raise UserError(f"{part} is missing, a part of {self.path}: fetch it next to it")
        return parts[1:]

    def _named(self):
        """Yield each tensor with its name in transformers."""
        paired = ARCHITECTURES[self.architecture][2]
        heads = {"attn_q": self.number("attention.head_count")}
        heads["attn_k"] = self.number("attention.head_count_kv", heads["attn_q"])
        for name, (stored, file) in self._stored.items():
            check_type(name, stored, file)
            if name == _ROPE_FACTORS:
                continue
            block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
            if name in _TOP:
                yield _TOP[name], Tensor(name, stored, file)
            elif block is not None and block[2] in _LAYER:
                theirs = f"model.layers.{block[1]}.{_LAYER[block[2]]}.{block[3]}"
                yield theirs, Tensor(name, stored, file, heads.get(block[2], 0) if paired else 0)
            else:
                raise UserError(
                    f"{file}: has the tensor {name}, which models of architecture "
                    f"{self.architecture!r} here do not have: give a model without it"
                )

    def _text(self, key: str) -> str:
        value = self.fields.get(key)
        if not isinstance(value, str):
            raise UserError(f"{self.path}: {key}={shown(value)} must be text; fetch it again")
        return value

    def number(self, key: str, default: int | None = None) -> int:
        """Return the positive integer `<architecture>.<key>`; raise `UserError` if it is none."""
        name = f"{self.architecture}.{key}"
        value = self.fields.get(name, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # one per layer, all equal
        if value is None:
            raise UserError(f"{self.path}: its metadata lacks {name}: fetch it again")
        if isinstance(value, int) and value < 1:
            raise UserError(f"{self.path}: {name}={value} must be 1 or more; fetch it again")
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(
                f"{self.path}: {name}={shown(value)} must be one integer for all layers: give "
                "a model with equal layers"
            )
        return value

    def _real(self, key: str, default: float | None = None) -> Any:
        """Return the float32 number `<architecture>.<key>` in its shortest decimal form.

        None if there is none. Raise `UserError` if it is not positive.
        """
        name = f"{self.architecture}.{key}"
        value = self.fields.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool | str | list) or not 0 < value < float("inf"):
            raise UserError(
                f"{self.path}: {name}={shown(value)} must be a positive number; fetch it again"
            )
        return float(str(np.float32(value)))

    def config(self) -> dict[str, Any]:
        """Return the config.json of the same model. Raise `UserError` for what it cannot say."""
        name, model_type, _ = ARCHITECTURES[self.architecture]
        if self.fields.get(f"{self.architecture}.expert_count"):
            raise UserError(f"{self.path}: has experts, which are not read from GGUF: use from_hf")
        heads, width = self.number("attention.head_count"), self.number("embedding_length")
        head_dim = self.number("attention.key_length", width // heads)
        rotated = self.number("rope.dimension_count", head_dim)
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise UserError(f"{self.path}: token_embd.weight is missing: fetch the model again")
        if embedding.shape[1:] != (width,):
            raise UserError(
                f"{self.path}: token_embd.weight has shape {embedding.shape}, its metadata asks "
                f"for rows of {width}: fetch it again"
            )
        if (epsilon := self._real("attention.layer_norm_rms_epsilon")) is None:
            raise UserError(
                f"{self.path}: its metadata lacks {self.architecture}.attention."
                "layer_norm_rms_epsilon: fetch it again"
            )
        halves = {"F16", "BF16"} & {t.stored.tensor_type.name for t in self.tensors.values()}
        config: dict[str, Any] = {
            "architectures": [name],
            "model_type": model_type,
            "torch_dtype": "bfloat16" if halves else "float32",
            "vocab_size": embedding.shape[0],
            "hidden_size": width,
            "intermediate_size": self.number("feed_forward_length"),
            "num_hidden_layers": self.number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.number("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": epsilon,
            "max_position_embeddings": self.number("context_length"),
            "rope_theta": self._real("rope.freq_base", 10_000.0),
            "rope_scaling": self._rope_scaling(head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.tensors,
        }
        if rotated != head_dim:
            config["partial_rotary_factor"] = rotated / head_dim
        for key, ours in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
            token = self.fields.get(f"tokenizer.ggml.{key}_token_id")
            config |= {} if token is None else {f"{ours}_token_id": token}
        return config

    def _field(self, key: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.architecture}.{key}", default)

    def _rope_scaling(self, head_dim: int) -> Mapping[str, Any] | None:
        """Return the scaling of rotary frequencies, from the metadata or a tensor of factors."""
        factor = self._real("rope.scaling.factor", self._field("rope.scale_linear"))
        kind = self._field("rope.scaling.type", "linear" if factor else "none")
        if kind not in ("none", None):
            for key, neutral in _NEUTRAL.items():
                if (value := self._field(key, neutral)) != neutral:
                    raise UserError(
                        f"{self.path}: {self.architecture}.{key}={shown(value)} is not supported: "
                        "convert the model's safetensors with from_hf"
                    )
            scaling = {"rope_type": kind, "factor": factor}
            betas = {name: self._real(f"rope.scaling.yarn_{name}") for name in _BETAS}
            scaling |= {name: value for name, value in betas.items() if value is not None}
            original = self._field("rope.scaling.original_context_length")
            if original is not None:
                scaling["original_max_position_embeddings"] = original
            return scaling
        if _ROPE_FACTORS not in self._stored:
            return None
        stored, file = self._stored[_ROPE_FACTORS]
        found = Tensor(_ROPE_FACTORS, stored, file).array().ravel()
        theta = self._real("rope.freq_base", 10_000.0)
        scaling = _LLAMA3 | {"factor": float(found.max())}
        ours = RopeScaling(
            "llama3",
            scaling["factor"],
            scaling["low_freq_factor"],
            scaling["high_freq_factor"],
            scaling["original_max_position_embeddings"],
        )
        scaled = rope_frequencies(head_dim, theta, ours)
        wanted = rope_frequencies(head_dim, theta, RopeScaling()) / scaled
        if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-4):
            raise UserError(
                f"{file}: the factors of {_ROPE_FACTORS} are not those of Llama 3.1 and later, "
                "the only ones supported: convert the model's safetensors with from_hf"
            )
        return scaling
