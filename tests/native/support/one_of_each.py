"""Which tests of compiled code stand in the fast suite."""

from __future__ import annotations

__all__ = ["FAST", "ONE_OF_EACH"]

FAST = ("test_lists.py", "test_memory.py")
"""Files that compile next to nothing."""

ONE_OF_EACH = {
    "direct": ("test_direct.py", "test_window"),
    "winograd": ("test_winograd.py", "test_dense"),
    "planes": ("test_planes.py", "test_merge"),
    "elementwise": ("test_planes.py", "test_add"),
    "pooling": ("test_pooling.py", "test_windows"),
    "attention": ("test_attention.py", "test_attention"),
    "window attention": ("test_window_attention.py", "test_biases"),
    "matmul": ("test_matmul.py", "test_product"),
    "dense": ("test_dense.py", "test_product"),
    "tokens": ("test_tokens.py", "test_select_tokens"),
    "islands": ("test_generic.py", "test_a_policy_is_right_on_any_machine_with_any_number_of_threads"),
}
"""File and name of a test for each family of kernels. The first case is fast: one kernel, small and from the cache
where it has been made before. Lists have a fast file of their own."""
