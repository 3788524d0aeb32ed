"""Rewrites of a lowered graph into what kernels read: the passes that finish the native backend's list."""
