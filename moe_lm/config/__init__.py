"""Every setting of a run with its check; a section is the YAML, the `key=value`, the flag and the HTTP field.

Reading order: section, model, data, training, generation, run, strict_yaml, synonyms, findings, moved,
reading, schema.
"""
