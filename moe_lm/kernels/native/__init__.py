"""The C++ of decoding on a CPU, compiled at its first use by `build`."""
