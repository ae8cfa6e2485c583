"""Memory that the package keeps from call to call, and how to have it back."""

from __future__ import annotations


def empty_cache() -> None:
    """Give back the memory on the CPU that is kept for the next call, as `torch.cuda.empty_cache` does on a GPU.

    Given back is what kernels work in, up to 16 MB for each thread and 48 MB for each thread that calls a model (calls
    on long utterances take more, and give that back by themselves), and what the C library's allocator holds free.
    Nothing has to be idle: what a call in another thread is using goes when that call is done, and the next call takes
    anew what it needs. Kept are packed weights (0.4 GB of a base model in float32), which belong to a model and go with
    it; `accelerate(model, keep_originals=False)` has them in place of the weights.
    """
    from .backends.cpu import extension  # which is not opened before somebody needs it
    from .memory import give_back_freed  # a program too, which is not to be imported before it runs

    extension.release_scratch()
    give_back_freed()
