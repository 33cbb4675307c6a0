"""Serve a checkpoint as a model of lm-evaluation-harness, in its process and without torch.

The harness passes all requests of a kind in one call. On several hosts, every process runs the same
harness on the same documents and calls the same methods. Each batch is sharded over all devices,
and every process gets all results.
"""

import dataclasses
import inspect
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import tqdm
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from mea_jax.checkpoint.load import open_trained, unresolved
from mea_jax.data import chat, end_tokens
from mea_jax.errors import UserError, fail, nearest
from mea_jax.evaluate.harness.encoding import RequestEncoder
from mea_jax.evaluate.harness.generating import (
    NEW_TOKENS,
    AnswerGenerator,
    GenerationCost,
    Prompt,
    check_options,
    read_number,
)
from mea_jax.evaluate.harness.likelihood import Request, Scorer, ScoringCost
from mea_jax.evaluate.harness.placing import placed
from mea_jax.ops.sampling import Sampling
from mea_jax.parallel import processes, sharding
from mea_jax.parallel.host import keep_freed_memory

BATCH_TOKENS = 4096
MAX_NEW = 256  # tokens of an answer if the task sets no limit: the harness's own default
_DTYPES = ("auto", "float32", "bfloat16")
_CACHE_DTYPES = (*_DTYPES, "int8")


@register_model("mea_jax")
class HarnessModel(TemplateLM):
    """A checkpoint of this project as a model of lm-evaluation-harness.

    Args:
      checkpoint: run directory, or one of its steps.
      max_length: maximum number of tokens of a request, context and answer; None stands for the
        window of training. Longer contexts are truncated at their beginning.
      dtype: of products.
      cache_dtype: of cached keys and values when answers are generated.
      batch_tokens: approximate number of positions of a batch on each device.
      add_bos_token: whether texts begin with the tokenizer's begin token. None stands for True if
        the tokenizer's own template adds one, or if no published model's files came with the
        tokenizer, because documents begin with one in training here.
      mesh: devices to divide the model over, such as "tensor=4,fsdp=2". None stands for the mesh
        of training on all devices.
      batch_size, max_batch_size, device: ignored; the harness's command line passes them to every
        model. Batches here are measured in positions, not texts, and use all devices of jax.

    Raises:
      UserError: as `load.open_trained`; an option is out of range; the tokenizer has more tokens
        than the model's vocabulary; the mesh does not fit the devices or the model.
    """

    def __init__(
        self,
        checkpoint: str,
        max_length: int | None = None,
        dtype: str = "auto",
        cache_dtype: str = "auto",
        batch_tokens: int = BATCH_TOKENS,
        add_bos_token: bool | None = None,
        mesh: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        for name, value, known in (
            ("dtype", dtype, _DTYPES),
            ("cache_dtype", cache_dtype, _CACHE_DTYPES),
        ):
            if value not in known:
                raise UserError(f"{name}={value}: {nearest(str(value), known)}")
        for name, number in (("max_length", max_length), ("batch_tokens", batch_tokens)):
            if number is not None and (not isinstance(number, int) or number < 2):
                raise UserError(f"{name}={number} must be a whole number, 2 or more")
        if jax.devices()[0].platform == "cpu":
            keep_freed_memory()
        trained = open_trained(Path(str(checkpoint)), _say)
        self.run, self.step = trained.checkpoints.directory.parent, trained.step
        config, self._tokens = trained.config, trained.tokenizer
        self.model = dataclasses.replace(unresolved(config.model), dtype=dtype)
        if self._tokens.vocab_size > self.model.vocab_size:
            raise UserError(
                f"{self.run / 'tokenizer'} has {self._tokens.vocab_size} tokens, but the model's "
                f"vocabulary has {self.model.vocab_size}: restore the tokenizer it was trained with"
            )
        self.max_length = max_length or trained.context_limit
        longest = self.model.longest_context()
        if longest is not None and self.max_length > longest:
            raise UserError(
                f"max_length={self.max_length}: the model has {longest} positions, "
                f"{self.model.limit_reason()}; choose at most that many"
            )
        self.mesh, self.params = placed(trained, self.model, _say, mesh)
        if add_bos_token is None:
            own = self._tokens.start != self._tokens.separator
            add_bos_token = own or not self._tokens.companions
        self._texts = RequestEncoder(
            self._tokens, [self._tokens.start] if add_bos_token else [], self.prefix_token_id
        )
        self.scorer = Scorer(self.model, self.params, self.mesh, batch_tokens)
        self.writer = AnswerGenerator(
            self.model,
            self.params,
            self.mesh,
            self._tokens,
            batch_tokens,
            None if cache_dtype == "auto" else cache_dtype,
        )
        self.work, self.written, self.truncated, self.seconds = (
            ScoringCost(),
            GenerationCost(),
            0,
            0.0,
        )

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """Create the model from `--model_args` as text."""
        return cls.create_from_arg_obj(
            utils.simple_parse_args_string(arg_string), additional_config
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """Create the model from `--model_args` as a dictionary.

        The harness's command line does not catch `UserError`, so it is printed here and the process
        exits with status 2.
        """
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        try:
            arg_dict = join_mesh(arg_dict)
            check_arguments(arg_dict)
            return cls(**{**arg_dict, **given})
        except UserError as error:
            fail(error)

    # -- the harness's interface of a model -------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self._tokens.separator

    @property
    def prefix_token_id(self) -> int:
        found = end_tokens.prefix_of(self._tokens.companions, self._tokens.vocabulary)
        return self._tokens.start if found is None else found

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW

    @property
    def tokenizer_name(self) -> str:
        return str(self.run / "tokenizer")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of one text.

        The begin token is included if `add_bos_token` is, unless `add_special_tokens` is False.
        """
        return self._texts.encode([string], add_special_tokens is not False)[0]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the model's chat template if `chat_template` asks for one, as the harness records.

        From then on texts are those of chats. Raise `UserError` if there is no template.
        """
        if not chat_template:
            return None
        if (found := chat.find_template(self._tokens.companions)) is None:
            raise UserError(
                f"--apply_chat_template: {self.tokenizer_name} has no chat template; leave it out"
            )
        self._texts.in_chat = True
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, up to the model's answer or within its last message."""
        self._texts.in_chat = True
        where = "--apply_chat_template"
        return chat.render(self._tokens, chat_history, where, answer=add_generation_prompt)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score the (context, continuation) of each request.

        Return (log-probability of the continuation in nats, whether greedy decoding would write it)
        for each. Raise `UserError` if a continuation is longer than `max_length`.
        """
        pairs = self._texts.encode_pairs([request.args for request in requests])
        for request, (_, continuation) in zip(requests, pairs, strict=True):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"task {request.task_name}: a continuation of {len(continuation)} tokens "
                    f"does not fit in {self.max_length}: raise --max_length"
                )
        whole = [(r.args, *pair) for r, pair in zip(requests, pairs, strict=True)]
        return self._loglikelihood_tokens(whole, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        scored = [self._request(context, new) for _, context, new in requests]
        found = self._score(scored, disable_tqdm, "log-likelihoods")
        for (given, *_), answer in zip(requests, found, strict=True):
            if given is not None:
                self.cache_hook.add_partial("loglikelihood", given, answer)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each complete text in nats.

        A text is split into windows of `max_length` tokens. Every token is scored once, given the
        tokens before it in its window.
        """
        texts = [request.args[0] for request in requests]
        # A tokenizer's own begin token counts as text, as in the harness's other models. The
        # separator that we put before texts does not: the first window begins with it anyway.
        own = self._texts.before if self._tokens.start != self._tokens.separator else []
        windows, owners = [], []
        for i, ids in enumerate(self._texts.encode(texts, begin=False)):
            rolled = utils.get_rolling_token_windows(
                own + ids, self.prefix_token_id, self.max_length, context_len=1
            )
            for context, new in map(utils.make_disjoint_window, rolled):
                windows.append(self._request(context, new))
                owners.append(i)
        sums = [0.0] * len(texts)
        found = self._score(windows, disable_tqdm, "rolling log-likelihoods")
        for i, (log_probability, _) in zip(owners, found, strict=True):
            sums[i] += log_probability
        for text, total in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        self.work.requests += len(texts) - len(windows)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each request's context, up to its first "until" text.

        Raise `UserError` if an option is unsupported or leaves no room for a prompt.
        """
        began = time.perf_counter()
        contexts = self._texts.encode([request.args[0] for request in requests], begin=True)
        prompts = [
            self._prompt(request, ids) for request, ids in zip(requests, contexts, strict=True)
        ]
        with _progress(len(prompts), disable_tqdm, "answers") as bar:
            texts = self.writer.write(prompts, self.written, bar.update)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        self.seconds += time.perf_counter() - began
        return texts

    # -- requests ---------------------------------------------------------------------------------

    def _request(self, context: list[int], new: list[int]) -> Request:
        whole = context + new
        if len(whole) > self.max_length + 1:
            self.truncated += 1
            whole = whole[-(self.max_length + 1) :]
        return Request(whole[:-1], new)

    def _prompt(self, request: Instance, ids: list[int]) -> Prompt:
        options = dict(request.args[1])
        until = options.get("until") or []
        task = str(request.task_name)
        check_options(task, options)
        count = MAX_NEW
        if (name := next((n for n in NEW_TOKENS if options.get(n) is not None), None)) is not None:
            count = read_number(task, options, name, int, None)
        elif options.get("max_length") is not None:  # of prompt and answer together
            longest = read_number(task, options, "max_length", int, None)
            if (count := longest - len(ids)) < 1:
                raise UserError(
                    f"task {task} has a prompt of {len(ids)} tokens and max_length={longest} for "
                    "prompt and answer: use fewer examples (--num_fewshot)"
                )
        if not 1 <= count < self.max_length:
            raise UserError(
                f"task {request.task_name} asks for {count} new tokens, which leaves no room for a "
                f"prompt in {self.max_length}: give a --max_length above {count}"
            )
        temperature = read_number(task, options, "temperature", float, 0)
        if options.get("do_sample") is False:
            temperature = 0.0
        sampling = Sampling(
            temperature,
            read_number(task, options, "top_k", int, 0),
            read_number(task, options, "top_p", float, 1) or 1.0,  # some tasks set 0 for all
        )
        if len(ids) > self.max_length - count:
            self.truncated += 1
            ids = ids[-(self.max_length - count) :]
        if not ids:
            ids = [self.prefix_token_id]
        until = (until,) if isinstance(until, str) else tuple(until)
        return Prompt(ids, until, count, sampling)

    # -- work -------------------------------------------------------------------------------------

    def _score(self, requests: list[Request], quiet: bool, what: str) -> list[tuple[float, bool]]:
        began = time.perf_counter()
        with _progress(len(requests), quiet, what) as bar:
            # A request without targets has probability one.
            found = [(0.0, True)] * len(requests)
            scored = [i for i, request in enumerate(requests) if request.targets]
            scores = self.scorer.score([requests[i] for i in scored], self.work, bar.update)
            for i, score in zip(scored, scores, strict=True):
                found[i] = score
        self.seconds += time.perf_counter() - began
        return found

    def report(self) -> dict[str, Any]:
        """Return counts of requests and tokens so far, the share of real tokens, and speeds."""
        work, written = self.work, self.written
        requests = work.requests + written.requests
        real = work.real + written.prompt_real + written.new_real
        computed = work.computed + written.prompt_computed + written.new_computed
        return {
            "requests": requests,
            "truncated": self.truncated,
            "max_length": self.max_length,
            "seconds": self.seconds,
            "requests_per_second": requests / self.seconds if self.seconds else None,
            "tokens_per_second": real / self.seconds if self.seconds else None,
            "real_share": real / computed if computed else None,
            "programs": work.programs + written.programs,
            "log_likelihoods": dataclasses.asdict(work),
            "answers": dataclasses.asdict(written),
        }


def join_mesh(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `--model_args` with the mesh as one text.

    lm-eval splits at commas: "mesh=tensor=4,fsdp=2" arrives as the mesh "tensor=4" and fsdp 2.
    """
    if given.get("mesh") is None:
        return dict(given)
    axes = [name for name in given if name in sharding.REQUESTED]
    mesh = ",".join([str(given["mesh"]), *(f"{name}={given[name]}" for name in axes)])
    return {name: value for name, value in given.items() if name not in axes} | {"mesh": mesh}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise `UserError` if `--model_args` has an unknown name or no checkpoint."""
    known = [name for name in inspect.signature(HarnessModel).parameters if name != "self"]
    listed = f"known arguments: {', '.join(known)}"
    for name in given:
        if name not in known:
            raise UserError(f"--model_args {name}=...: unknown argument, remove it; {listed}")
    if not given.get("checkpoint"):
        raise UserError(f"--model_args has no checkpoint: add checkpoint=runs/quickstart; {listed}")


def _say(line: str) -> None:
    if processes.is_first():
        print(line, file=sys.stderr, flush=True)


def _progress(total: int, quiet: bool, what: str) -> Any:
    # None disables the bar if stderr is no terminal.
    disable = True if quiet or not processes.is_first() else None
    return tqdm.tqdm(total=total, desc=what, disable=disable, leave=False)
