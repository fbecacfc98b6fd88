"""Replace methods of a transformers trainer, to run code at moments at which the trainer sends no event."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from kedit_train.callbacks.hosts.teacher_vocabulary import check_teacher_vocabulary
from kedit_train.compatibility import keeping_checkpointing
from kedit_train.core.after_end import check_after_end
from kedit_train.core.reference_weights import check_unchanged
from kedit_train.core.run import EditRun

_LOOP = "_inner_training_loop"
_EPOCH = "_run_epoch"
_BATCHES = "get_batch_samples"
_LOAD = "_load_from_checkpoint"
_SETUP = "_hp_search_setup"


class _Guard:
    """Replace a method of one trainer.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Any) -> None:
        # A strong reference would create a reference cycle that keeps the trainer and its model in memory.
        self._weak = weakref.ref(trainer)

    @property
    def _trainer(self) -> Any:
        trainer = self._weak()
        assert trainer is not None
        return trainer

    def __reduce__(self) -> tuple[Any, ...]:
        # This method is called when the trainer is copied. The copy of the trainer gets its own guard. At this time,
        # the copy is not complete yet.
        return type(self), (self._weak(),)


class GuardedLoop(_Guard):
    """Run the training loop of a ``transformers.Trainer``, with checks before the loop and a cleanup after an error.

    An instance replaces the method ``_inner_training_loop`` of one trainer. It does four things that a callback of the
    trainer cannot do:

    - It checks the checkpoint from which the trainer resumes, before the trainer loads the optimizer state. The first
      event of the training comes only after this loading.
    - It checks the vocabulary of the trainer's teacher, if there is one, before the loop.
    - It closes every ``EditRun`` of the trainer if an exception or ^C ends the loop. The trainer sends no event in this
      case.
    - It prevents a further step if the checkpoint is from the last step. Without this, the trainer would take one more
      step, unless an epoch ends at the last step.

    Args:
        trainer: the trainer.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        loop = getattr(type(trainer), _LOOP)
        try:
            if isinstance(load := trainer.__dict__.get(_LOAD), GuardedLoad):
                load.join_again()
            if isinstance(checkpoint := kwargs.get("resume_from_checkpoint"), str):
                for run in _runs(trainer):
                    run.host.check_checkpoint(run, checkpoint)
            check_teacher_vocabulary(trainer)
            if hasattr(type(trainer), _EPOCH):
                trainer.__dict__[_EPOCH] = self._run_epoch
            else:
                # transformers 4 runs the epochs inside of the loop.
                trainer.__dict__[_BATCHES] = self._get_batches
            with keeping_checkpointing(trainer):
                result = loop(trainer, *args, **kwargs)
            for run in _runs(trainer, closed=True):
                check_after_end(run)
            return result
        except BaseException:
            for run in _runs(trainer):
                run.close()
            raise
        finally:
            for name in (_EPOCH, _BATCHES):
                trainer.__dict__.pop(name, None)

    def _has_steps_left(self) -> bool:
        state = self._trainer.state
        return not state.max_steps or state.global_step < state.max_steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        if self._has_steps_left():
            return getattr(type(trainer), _EPOCH)(trainer, *args, **kwargs)
        # With a streaming data set, the trainer would otherwise begin epochs without end.
        trainer.control.should_training_stop = True

    def _get_batches(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        if self._has_steps_left():
            return getattr(type(self._trainer), _BATCHES)(self._trainer, *args, **kwargs)
        return [], None


class GuardedLoad(_Guard):
    """Load a checkpoint for a ``transformers.Trainer``, and close the edit runs of the trainer if loading fails.

    A run (:class:`~kedit_train.core.run.EditRun`) connects the callbacks of one edit to the model. An instance of this
    class replaces the method ``_load_from_checkpoint`` of one trainer. ``train()`` calls this method before the
    training loop begins.

    The instance first checks whether the checkpoint fits the scope and the adapters of the runs. If not, it raises an
    error of one line. The error of torch would list every weight whose shape differs. If the check or the loading
    fails, the instance closes the runs, so the next ``train()`` begins with new runs.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._released: list[Any] = []

    def __call__(self, resume_from_checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        self.join_again(loads=True)
        try:
            for run in _runs(trainer):
                run.host.check_saved_scope(run, resume_from_checkpoint)
            return getattr(type(trainer), _LOAD)(trainer, resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Close every ``EditRun`` of the trainer. Call this method when ``train()`` fails before its training loop."""
        self._released = _runs(self._trainer) or self._released
        for run in self._released:
            run.close()

    def join_again(self, loads: bool = False) -> None:
        """Create a new ``EditRun`` for each run that :meth:`release` has closed.

        Args:
            loads: whether the trainer loads a checkpoint next.
        """
        released, self._released = self._released, []
        for run in released:
            if not loads:
                # The failed call may have loaded a part of the weights.
                check_unchanged(run.scope, run.reference)
            for callback in run.callbacks:
                callback.join_trainer(self._trainer)


class GuardedSetup(_Guard):
    """Close the edit runs of a ``transformers.Trainer`` if it should resume, but has no checkpoint.

    A run (:class:`~kedit_train.core.run.EditRun`) connects the callbacks of one edit to the model. If the output folder
    contains no checkpoint, ``train(resume_from_checkpoint=True)`` raises an error. The trainer sends no event in this
    case, so its callbacks could not close the runs.

    An instance of this class replaces the method ``_hp_search_setup`` of one trainer. ``train()`` calls this method
    just before it searches for a checkpoint. If there is no checkpoint, the instance closes the runs.

    Args:
        trainer: the trainer.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        # train() itself is not replaced, because in Trainer(...).train() only the guard would refer to the trainer, and
        # the guard's weak reference would not keep the trainer alive.
        if sys._getframe(1).f_locals.get("resume_from_checkpoint") is True and not _has_checkpoint(trainer):
            trainer.__dict__[_LOAD].release()
        return getattr(type(trainer), _SETUP)(trainer, *args, **kwargs)


def _has_checkpoint(trainer: Any) -> bool:
    try:
        return get_last_checkpoint(trainer.args.output_dir) is not None
    except OSError:
        return False


def guard_loop(control: Any) -> None:
    """Replace three methods of a trainer by objects that also close the edit runs if training fails.

    The objects are a :class:`GuardedLoop`, a :class:`GuardedLoad` and a :class:`GuardedSetup`. Call this function from
    a callback of the trainer.

    Args:
        control: the control object that the trainer passes to its callbacks.
    """
    trainer = calling_trainer(control)
    if trainer is not None and _LOOP not in trainer.__dict__ and hasattr(type(trainer), _LOOP):
        trainer.__dict__[_LOOP] = GuardedLoop(trainer)
        if hasattr(type(trainer), _LOAD):
            trainer.__dict__[_LOAD] = GuardedLoad(trainer)
            if hasattr(type(trainer), _SETUP):
                trainer.__dict__[_SETUP] = GuardedSetup(trainer)


def calling_trainer(control: Any) -> Any | None:
    """Find the trainer of a control object in the call stack. Callbacks do not receive the trainer itself."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if getattr(caller, "control", None) is control and hasattr(caller, "callback_handler"):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _runs(trainer: Any, closed: bool = False) -> list[Any]:
    """Return the open runs of the trainer without duplicates, or the closed runs if ``closed`` is True."""
    found = {
        id(run): run
        for callback in trainer.callback_handler.callbacks
        if isinstance(run := getattr(callback, "run", None), EditRun)
        and run.host.owner is trainer.control
        and run.closed == closed
    }
    return list(found.values())
