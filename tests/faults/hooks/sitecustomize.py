"""Python imports this by itself where its folder is on PYTHONPATH: faults in the ranks of a run that is not changed."""

import os

if "RETEMPER_FAULT" in os.environ and "RANK" in os.environ:  # in ranks, not in their launcher
    import fault_hook

    fault_hook.install(os.environ["RETEMPER_FAULT"], int(os.environ["RANK"]))
