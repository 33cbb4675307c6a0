"""Programs that the processes of test_processes.py run, as text for `python -c`."""

# A config file that loads a JSON file.
CONFIG = """
import json
from mea_jax.config.schema import default_config

def get_config():
    config = default_config()
    with open({path!r}) as file:
        tree = json.load(file)
    tree["data"]["sources"] = tuple(tree["data"]["sources"])
    config.update(tree)
    return config
"""

# Each of four processes: place batches on meshes of all kinds, train, and resume a run of two.
FOUR = """
import json, sys
from pathlib import Path
import jax, numpy as np
from mea_jax import cli
from mea_jax.parallel import processes
from mea_jax.parallel import batches, sharding
from mea_jax.config.parse import from_dict
from mea_jax.config.schema import MeshConfig
from mea_jax.data.pipeline import held_out_batches, train_batches
from mea_jax.data.multi_host import prepare_together
from mea_jax.train.run import train

def main():
    address, index, given, fresh, resumed = arguments[1:]
    processes.start(coordinator=address, count=4, index=int(index), timeout=60)
    cli.enable_compilation_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # for the second run
    config = from_dict(json.loads(Path(given).read_text()))
    size, length = config.batch_size, config.data.context_length
    prepared = prepare_together(config.data, None, log=lambda line: None)
    for sizes, order in (((4, 1, 1), -1), ((1, 2, 2), 1), ((2, 1, 2), -1), ((1, 2, 1, 2), 1)):
        mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[::order])
        where = sharding.batch_sharding(mesh)
        rows = batches.local_rows(where, (size, length))
        assert len(rows) == size // (sizes[0] * sizes[1]), rows
        gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
        for read, options in (
            (train_batches, {"seed": 0, "start_step": 3}),
            (held_out_batches, {}),
        ):
            part = next(read(prepared, batch_size=size, rows=rows, **options))
            whole = next(read(prepared, batch_size=size, **options))
            for name, x in part.items():
                found = gather(batches.place_rows(where, x, rows, size))
                np.testing.assert_array_equal(np.asarray(found), whole[name])
    train(config, Path(fresh))
    train(config, Path(resumed))

arguments = sys.argv
sys.argv = sys.argv[:1]  # no flags
cli.run(main)
"""

# Each of two processes: communicate until one of them is killed.
KILLED = """
import os, signal, sys
import jax, numpy as np
from mea_jax import cli
from mea_jax.parallel import processes

processes._FAREWELL_SECONDS = 1.0

def main():
    processes.start(coordinator=ADDRESS, count=2, index=INDEX, timeout=60)
    from jax.experimental import multihost_utils
    for step in range(1000):
        multihost_utils.process_allgather(np.ones(3))
        if step == 3 and INDEX == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)

cli.run(main)
"""

# Each of two processes: join, finish, and report whether the watcher of the others still runs.
FINISHED = """
import threading
from mea_jax.parallel import processes

processes.start(coordinator=ADDRESS, count=2, index=INDEX, timeout=60)
threads = lambda: [thread.name for thread in threading.enumerate()]
assert "watcher" in threads()
processes.finish()
assert "watcher" not in threads()
"""
