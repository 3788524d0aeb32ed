"""Measuring a machine: how long its kernels take, and which it is fastest with."""
