"""Chat templates in the manner of other models' and small tokenizers for them: written here, from what those do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TINY = Path(__file__).parents[3] / "tokenizer" / "tiny" / "tokenizer.json"


@dataclass(frozen=True)
class Style:
    """A template, the tokens it is for, and what sets it apart."""

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    plain: tuple[str, ...] = ()  # added tokens that are not special
    arguments_as_text: bool = False  # the template expects a call's arguments as JSON text
    end: str = ""  # the token that ends an answer, where it is not eos


# A default system prompt; tools in it; earlier reasoning is dropped; results of tools are gathered in a user's turn.
CHATML = Style(
    """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if message.role == 'user' and ns.last_query == messages | length - 1 %}
        {%- set ns.last_query = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- set thought = message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if not loop.first or content %}{{- '\\n' }}{%- endif %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    plain=("<think>", "</think>", "<tool_call>", "</tool_call>"),
)

# Strips what is said; a header per turn; a call of a tool is the whole turn and ends with another token.
LLAMA = Style(
    """{{ bos_token }}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- '}<|eom_id|>' }}
    {%- else %}
        {%- set role = 'ipython' if message.role == 'tool' else message.role %}
        {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
        {%- if loop.first and tools %}{% for tool in tools %}{{ tool | tojson(indent=2) }}\n\n{% endfor %}{% endif %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|eos|>"),
    eos="<|eos|>",
    bos="<|begin_of_text|>",
    end="<|eot_id|>",
)

# The roles' tokens are not special; arguments are text; an open thought ends the prompt; tools' results have no role.
DEEPSEEK = Style(
    """
{%- set ns = namespace(system='', after_tool=false) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% set ns.system = ns.system + message['content'] %}{% endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- if tools %}{{- '\\n## Tools\\n' + tools | tojson }}{% endif %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- if ns.after_tool %}{{- '<｜tool▁outputs▁end｜>' }}{% endif %}
        {%- set ns.after_tool = false %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' and message['tool_calls'] %}
        {{- '<｜Assistant｜>' + (message['content'] or '') + '<｜tool▁calls▁begin｜>' }}
        {%- for call in message['tool_calls'] %}
            {{- '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>```json\\n' }}
            {{- call['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- ('<｜tool▁outputs▁end｜>' if ns.after_tool else '<｜Assistant｜>') + content + '<｜end▁of▁sentence｜>' }}
        {%- set ns.after_tool = false %}
    {%- elif message['role'] == 'tool' %}
        {{- '' if ns.after_tool else '<｜tool▁outputs▁begin｜>' }}
        {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
        {%- set ns.after_tool = true %}
    {%- endif %}
{%- endfor %}
{%- if ns.after_tool %}{{- '<｜tool▁outputs▁end｜>' }}
{%- elif add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{% endif %}
""",
    special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    eos="<｜end▁of▁sentence｜>",
    bos="<｜begin▁of▁sentence｜>",
    plain=(
        "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>",
        "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    ),
    arguments_as_text=True,
)  # fmt: skip

# Refuses a system role and turns out of order; no prompt of its own for an answer; tools before the last question.
MISTRAL = Style(
    """
{%- for message in messages %}{% if message.role == 'system' %}
    {{- raise_exception('only user, assistant and tool are supported') }}
{%- endif %}{% endfor %}
{%- set questions = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if not loop.last and messages[loop.index].role == 'user' %}
            {{- raise_exception('roles must alternate') }}
        {%- endif %}
        {%- if tools and message == questions[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content.strip() + ' [/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('ids of calls have 9 characters') }}
            {%- endif %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] + ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id + '"}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
""",
    special=(
        "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    eos="</s>",
    bos="<s>",
)  # fmt: skip

# No token of its own ends a turn: the next turn's does.
GLM = Style(
    """[gMASK]<sop>
{%- if tools %}{{ '<|system|>\\n# Tools' }}{% for tool in tools %}{{ '\\n' ~ tool | tojson }}{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- if (message.content or '').strip() %}{{- '\\n' + message.content.strip() }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>' + call.function.name }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '\\n<arg_key>' ~ key ~ '</arg_key>\\n<arg_value>' }}
                {{- value | tojson if value is not string else value }}
                {{- '</arg_value>' }}
            {%- endfor %}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- '<|' + ('observation' if message.role == 'tool' else message.role) + '|>\\n' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}""",
    special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
    eos="<|endoftext|>",
    end="<|user|>",
)

# The end of a turn and eos, one after the other; the conversation may go on.
EOS_TOO = Style(
    """{% for message in messages %}{{ '<|' ~ message.role ~ '|>\\n' ~ message.content ~ '<|end|>' }}
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}""",
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    eos="<|endoftext|>",
    end="<|end|>",
)

# Eos ends the text, not the turn.
EOS_AT_LAST = Style(
    """{% for message in messages %}{{ '<|' ~ message.role ~ '|>\\n' ~ message.content ~ '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    eos="<|endoftext|>",
    end="<|end|>",
)

# Says itself what is trained on: here without the end of the turn.
GENERATION = Style(
    """{% for message in messages %}{{ '<|' ~ message.role ~ '|>' }}{% if message.role == 'assistant' %}
{%- generation %}{{ message.content }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif %}{{ '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    eos="<|end|>",
)

# A tool's result names the call that it answers, in the words of the assistant's message.
NAMED = Style(
    """{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|assistant|>to=' + call.name + ' ' + call.arguments | tojson + '<|call|>' }}
    {%- elif message.role == 'tool' %}
        {%- set call = messages[loop.index0 - 1].tool_calls[0].function %}
        {{- '<|tool|>from=' + call.name + ' ' + message.content + '<|end|>' }}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|call|>"),
    eos="<|end|>",
)

STYLES = {
    "chatml": CHATML, "llama": LLAMA, "deepseek": DEEPSEEK, "mistral": MISTRAL, "glm": GLM, "eos_too": EOS_TOO,
    "eos_at_last": EOS_AT_LAST, "generation": GENERATION, "named": NAMED,
}  # fmt: skip


def save(style: Style, folder: Path, spaces: bool = False) -> Path:
    """A folder as others save it. Text is cut into bytes, or, as SentencePiece does, at `spaces` which become ▁."""
    backend = _by_spaces() if spaces else _by_bytes()
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in style.special])
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in style.plain])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": style.eos}
    if style.bos:
        config["bos_token"] = style.bos
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(style.template, encoding="utf-8")
    return folder


def _by_bytes() -> tokenizers.Tokenizer:
    content = json.loads(TINY.read_text(encoding="utf-8"))
    return tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": [], "post_processor": None}))


def _by_spaces() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    text = ["What does it do? It joins two paths. Thanks a lot", '{"name": "weather", "content": 12, "city": "Oslo"}\n']
    alphabet = [chr(code) for code in range(32, 127)] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[f"<0x{byte:02X}>" for byte in range(256)], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(text * 8, trainer)
    content = json.loads(backend.to_str())
    return tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
