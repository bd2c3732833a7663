"""The data plane on a GPU: device kernels behind a C ABI, and their twin, which runs the same code on host memory."""
