"""The equations, on one device: imports torch and the config, and has no branch on a device.

Reading order: transformer, attention, latent_attention, kv_cache, moe, layers, rotary, drawing, lora, size.
"""
