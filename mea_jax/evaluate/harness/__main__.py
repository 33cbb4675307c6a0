"""Run the harness's own command line with `--model mea_jax` available.

python -m mea_jax.evaluate.harness run --model mea_jax --model_args checkpoint=runs/quickstart \
    --tasks hellaswag

lm-eval up to 0.4.13 does not read the entry points `lm_eval.models`, so this command registers the
model. Later versions that read them find it without this command. All options are lm-eval's.
"""

import importlib

from mea_jax import cli
from mea_jax.errors import UserError, fail
from mea_jax.evaluate.harness.run import require_harness
from mea_jax.parallel import processes


def main() -> None:
    """Register the model and run lm-eval's command line; print a `UserError` as one line."""
    try:
        require_harness()
        from lm_eval.__main__ import cli_evaluate

        importlib.import_module("mea_jax.evaluate.harness.model")  # registers itself on import
        cli_evaluate()
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        processes.end(130, "\nstopped", by_signal=True)
    except Exception as error:
        if (problem := cli.outside_problem(error)) is not None:
            fail(problem)
        raise


if __name__ == "__main__":
    main()
