"""Fine-tuning: an image folder and a timm name -> a checkpoint folder in timm's Hub format.

Loader, augmentation, optimiser, scheduler, losses and metrics are timm's. An interrupted run
continues exactly: every epoch is seeded by (seed, epoch, process), the augmentation of every image
by (seed, epoch, index), and a run that was asked to stop saves the step it stopped at together with
the generators' states.
"""

import sys

from ema_timm.training.claim import claim
from ema_timm.training.processes import is_main, join_processes, use_threads
from ema_timm.training.run import Run
from ema_timm.training.settings import FinetuneConfig
from ema_timm.training.state import RunState
from ema_timm.training.stop import stop_on_signal


def finetune(config: FinetuneConfig, resume: bool = False, progress: bool = True) -> dict:
    """Fine-tune a timm model on an image folder.

    Args:
        config: The run's settings. With ``resume`` they must be those of the interrupted run.
        resume: Continue the run in ``config.output``; one that is finished too, if ``epochs`` are
            more, as a new run from its last weights.
        progress: Show bars (on a terminal) and a line an epoch on stderr.

    Returns:
        The content of results.json, for the weights of the best epoch.

    Raises:
        UserError: For bad input; nothing was written that was not there.
        HubError: If the Hub does not give the weights to start from, or gives them damaged.
        InterruptedRunError: After Ctrl-C or SIGTERM; ``resume`` continues.
    """
    saved = RunState(config.output)
    with claim(saved, resume):
        return _train(config, _read(saved) if resume else None, progress)


def continue_run(given: dict, progress: bool = True) -> dict:
    """Continue an interrupted run with its own settings; returns and raises as `finetune` does.

    Args:
        given: Settings by name: ``output``, and those that are to be said again or may differ.
        progress: As in `finetune`.
    """
    saved = RunState(given["output"])
    with claim(saved, resume=True):
        state = _read(saved)
        return _train(FinetuneConfig(**{**state["config"], **given}), state, progress)


def _read(saved: RunState) -> dict:
    state = saved.load()
    if saved.trouble and is_main():
        print(saved.trouble, file=sys.stderr)
    return state


def _train(config: FinetuneConfig, state: dict | None, progress: bool) -> dict:
    # The sums of another number of threads are rounded otherwise: a run keeps its own.
    threads = state["identity"].get("threads") if state else None
    with use_threads(threads), join_processes(config.device) as process:
        run = Run(config, state, process, progress and process.main)
        with stop_on_signal() as stop:
            return run.train(stop)
