"""The JSON schema of a config, for editors that complete and check YAML as it is typed."""

from __future__ import annotations

from typing import Any

from moe_lm.config.data import ChatSource, TokenizerRecipe
from moe_lm.config.run import FinetuneConfig, PretrainConfig
from moe_lm.config.section import Section

KINDS: dict[str, type[Section]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "tokenizer": TokenizerRecipe,
}
TEXT = {"type": "string"}


def schema_of(kind: type[Section]) -> dict[str, Any]:
    """The schema of a config as a person writes it: a section may be the path of a file, and so may a source of chats.

    What must not be missing is left to the verbs: it depends on other settings, and on what the files hold.
    """
    schema = kind.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part.pop("required", None)
        for name, value in part["properties"].items():
            if part is schema and name in kind.model_fields:
                part["properties"][name] = _or_text(value, of_all=True)
            else:
                part["properties"][name] = _or_text(value, of_all=False)
    for part in schema.get("$defs", {}).values():
        if "rope_scaling" in part["properties"]:  # the name of transformers 5, read in its place
            part["properties"]["rope_parameters"] = {"type": "object"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _or_text(value: Any, of_all: bool) -> Any:
    """A schema in which a text may stand in place of a section: of any, or of a source of conversations."""
    if isinstance(value, list):
        return [_or_text(item, of_all) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value and (of_all or value["$ref"].endswith(f"/{ChatSource.__name__}")):
        others = {name: item for name, item in value.items() if name != "$ref"}
        return {"anyOf": [{"$ref": value["$ref"]}, TEXT], **others}
    return {name: _or_text(item, of_all) if name in ("anyOf", "items") else item for name, item in value.items()}
