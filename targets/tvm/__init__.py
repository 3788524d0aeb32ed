"""The native backend: kernels generated with TVM, a static plan and a C runtime of our own."""
