"""The faults by name.

Each is a function of a trial's `Scratch`. It raises `Failed` unless the run ends like a run without
the fault, or as the function's docstring says.
"""

from collections.abc import Callable

from tests.campaigns.faults import of_contents, of_disks, of_processes
from tests.campaigns.faults.runs import Scratch

Fault = Callable[[Scratch], None]
KINDS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        *(of_processes.kill, of_processes.kill_in_save, of_processes.term),
        *(of_disks.disk_full, of_disks.read_only),
        *(of_disks.truncated, of_disks.flipped, of_disks.missing),
        *(of_processes.second, of_processes.host, of_processes.host_term),
        *(of_contents.data_stop, of_contents.data_skip),
        *(of_contents.nan, of_contents.nan_limit, of_contents.spike),
    )
}
# The faults that must detect that a guard is disabled.
SHOWN_BY = {
    "digests": ("flipped",),
    "lock": ("second",),
    "cleaning": ("kill_in_save",),
    "skipping": ("nan",),
    "skip_limit": ("nan_limit",),
    "spikes": ("spike",),
    "position": ("spike",),
    "sigterm": ("term",),
    "metrics": ("term",),
}
