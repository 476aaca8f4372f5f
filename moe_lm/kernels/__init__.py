"""Faster code for single operations of the model, chosen by name and put in their place from outside.

Reading order: kernels, available, attention, cpu_attention, flash_attention, grouped_mm, rounding, cpu_decode, native,
huge_pages, device.
"""
