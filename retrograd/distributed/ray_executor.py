"""An executor whose work runs on a Ray cluster, for whatever takes a `concurrent.futures.Executor`."""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from typing import Any

from torch import Tensor

from retrograd.optional import optional

LARGE = 100_000  # bytes; Ray, too, sends smaller arguments with the task
REMEMBERED = 8  # large arguments; without a bound, a stream of different ones would fill the object store


class RayExecutor(Executor):
    """Runs functions as tasks of a Ray cluster.

    It uses the Ray that is initialised. Else it calls ``ray.init()``, which connects to the cluster that ``RAY_ADDRESS``
    names or that was started on this machine, or starts one; ``shutdown`` ends that again. Every node needs the same
    versions of Python, Ray and retrograd, and the modules of the functions that are submitted.

    Large ``bytes`` and tensors go to the object store once, however many tasks get the same object. A tensor that was
    changed in place goes again, but not if it was changed behind PyTorch's back (through ``.data`` or NumPy).

    Ray does not say when a task begins: a future is never ``running()``, and ``cancel()`` does not refuse a task that has
    begun but interrupts it, as Ctrl-C does. Callbacks of futures run in a thread of Ray and must not wait for other futures.

    Args:
        num_cpus: processors that one task takes.
        num_gpus: GPUs that one task takes; tasks with a fraction share one.
        options: what else ``ray.remote`` takes: ``resources``, ``runtime_env``, ``max_retries=0`` (not again if a worker dies).
    """

    def __init__(self, *, num_cpus: float = 1, num_gpus: float = 0, **options: Any) -> None:
        self._ray = optional("ray", "ray")
        self._owns_ray = not self._ray.is_initialized()
        if self._owns_ray:
            self._ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        # One remote function calls all others: the cluster keeps every remote function that it was ever given.
        call = self._ray.remote(lambda function, /, *args, **kwargs: function(*args, **kwargs))
        self._task = call.options(num_cpus=num_cpus, num_gpus=num_gpus, **options)
        self._shared: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._unfinished: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._closing: threading.Thread | None = None

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``function(*args, **kwargs)`` on the cluster.

        What the function raises arrives as it is, with a ``__cause__`` that shows where in the cluster it comes from.
        """
        with self._lock:
            if self._closing is not None:
                raise RuntimeError("this RayExecutor is shut down and takes no more work. Make a new one.")
            named = {name: self._share(value) for name, value in kwargs.items()}
            future = _RayFuture(self._ray, self._task.remote(function, *map(self._share, args), **named))
            self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work, and let go of Ray when all is done; if ``wait`` is false, that is left to a thread."""
        with self._lock:
            if self._closing is None:
                self._closing = threading.Thread(target=self._close, args=(self._unfinished.copy(),))
                self._closing.start()
        for future in self._unfinished.copy() if cancel_futures else ():
            future.cancel()
        if wait:
            self._closing.join()

    def _close(self, unfinished: set[Future[Any]]) -> None:
        wait(unfinished)
        self._shared.clear()
        if self._owns_ray:
            self._ray.shutdown()

    def _share(self, value: Any) -> Any:
        """Replace a large argument by a reference to it in the object store."""
        size = version = 0
        if isinstance(value, bytes):
            size = len(value)
        elif isinstance(value, Tensor) and not value.is_inference():  # an inference tensor does not count its changes
            size, version = value.numel() * value.element_size(), value._version
        if size < LARGE:
            return value
        # The object is kept beside its reference, so that no other one gets its id.
        entry = self._shared.pop((id(value), version), None) or (value, self._ray.put(value))
        self._shared[id(value), version] = entry  # a dict keeps this order: the one unused for longest comes first
        if len(self._shared) > REMEMBERED:
            del self._shared[next(iter(self._shared))]
        return entry[1]


class _RayFuture(Future[Any]):
    """A future that cancels its Ray task too, and that fails with the function's own exception."""

    def __init__(self, ray: Any, reference: Any) -> None:
        super().__init__()
        self._ray, self._reference = ray, reference
        reference.future().add_done_callback(self._finish)

    def cancel(self) -> bool:
        reference, cancelled = self._reference, super().cancel()
        if cancelled and reference is not None:
            self._ray.cancel(reference)
        return cancelled

    def _finish(self, task: Future[Any]) -> None:
        self._reference = None  # the object store need not keep a result that is here
        if not self.set_running_or_notify_cancel():
            return
        error: Any = task.exception()
        if isinstance(error, self._ray.exceptions.RayTaskError):
            error.cause.__cause__ = error
            error = error.cause
        if error is None:
            self.set_result(task.result())
        else:
            self.set_exception(error)
