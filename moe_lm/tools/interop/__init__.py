"""To and from Hugging Face, each way proven equal; and from dense to sparse.

Reading order: families, fitting, hf_config, hf_tensors, hf_folder, fp8, importing, exporting, carried, transfer,
proof, models, logits, peft_adapter, upcycle.
"""
