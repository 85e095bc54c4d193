"""Roles of the tokens in a conversation about images, as a vision–language processor lays them out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from .tokens import _CLOSE, _OPEN, _roles_of_tokens


@dataclass(frozen=True)
class ImageConversation:
    """One conversation as a vision–language model's inputs, with a boolean mask (1, t) for each role.

    context: the image tokens, and those of "context" parts. Empty where truncation would have cut image tokens, as
    models refuse part of an image.
    """

    inputs: dict[str, Any]
    assistant: Bool[Tensor, "1 t"]
    query: Bool[Tensor, "1 t"]
    context: Bool[Tensor, "1 t"]


def image_token_ids(model: nn.Module, processor: Any, *, delimiters: bool = True) -> frozenset[int]:
    """Token ids that stand for images: the placeholder and, with `delimiters`, the marks of an image's start and end.

    Raises ValueError where neither the model's configuration nor the processor names a placeholder.
    """
    config, tokenizer = getattr(model, "config", None), getattr(processor, "tokenizer", processor)
    names = ["image_token_id", "image_token_index"]
    found = {getattr(owner, name, None) for owner in (config, processor, tokenizer) for name in names}
    if not any(isinstance(token, int) for token in found):
        raise ValueError("model: neither its configuration nor the processor has an image token")
    if delimiters:
        found |= {getattr(config, name, None) for name in ("vision_start_token_id", "vision_end_token_id")}
        found |= {getattr(config, name, None) for name in ("boi_token_index", "eoi_token_index")}
    return frozenset(token for token in found if isinstance(token, int))


def image_conversation(
    processor: Any,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Any],
    placeholders: Iterable[int],
    *,
    query: Literal["user_content", "non_assistant"] = "non_assistant",
    max_length: int = 4096,
) -> ImageConversation:
    """A conversation through the processor's chat template, without a generation prompt, cut at `max_length` tokens.

    messages: {"role", "content"} with a list of {"type": "image"} and {"type": "text" | "context", "text": …} as
    content; images in the order of their parts; placeholders as from `image_token_ids`. query: "non_assistant" = all
    tokens but the assistant's contents and the context (as ScalSelect's code does), "user_content" = the other text of
    user messages. Roles are found by character offset before the processor repeats the placeholders. Raises ValueError
    where the template changes the contents or the processor inserts tokens other than the placeholders.
    """
    if query not in ("user_content", "non_assistant"):
        raise ValueError(f"query: 'user_content' or 'non_assistant', got {query!r}")
    wanted = sum(part["type"] == "image" for message in messages for part in message["content"])
    if wanted != len(images):
        raise ValueError(f"images: the conversation has {wanted} image parts, got {len(images)} images")
    text, spans = _rendered(processor, messages)
    plain = processor.tokenizer(text, return_offsets_mapping=True)
    inputs = dict(processor(text=[text], **({"images": [list(images)]} if images else {}), return_tensors="pt"))
    ids, marks = inputs["input_ids"][0].tolist(), frozenset(placeholders)
    roles = _repeated(plain["input_ids"], _roles_of_tokens(plain["offset_mapping"], spans), ids, marks)
    image = torch.tensor([token in marks for token in ids])
    context = image | torch.tensor([role == "context" for role in roles])
    assistant = torch.tensor([role == "assistant" for role in roles]) & ~context
    asked = torch.tensor([query == "non_assistant" or role == "user" for role in roles]) & ~context & ~assistant
    if bool(image[max_length:].any()):
        context = torch.zeros_like(context)
    length = len(ids)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == (1, length):
            inputs[name] = value[:, :max_length]
    return ImageConversation(inputs, *(mask[None, :max_length] for mask in (assistant, asked, context)))


def _rendered(processor: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int, str]]]:
    """(conversation as the template renders it, [(start, end, role)] of the texts in characters)."""
    for strip in (False, True):
        plain, marked, texts = [], [], []
        for message in messages:
            parts, with_marks = [], []
            for part in message["content"]:
                if part["type"] == "image":
                    parts.append(part)
                    with_marks.append(part)
                    continue
                content = part["text"].strip() if strip else part["text"]
                texts.append(("context" if part["type"] == "context" else message["role"], content))
                parts.append({"type": "text", "text": content})
                with_marks.append({"type": "text", "text": f"{_OPEN}{content}{_CLOSE}"})
            plain.append({**message, "content": parts})
            marked.append({**message, "content": with_marks})
        text = processor.apply_chat_template(plain, tokenize=False)
        pieces_of = processor.apply_chat_template(marked, tokenize=False)
        pieces = list(re.finditer(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}", pieces_of))
        unchanged = pieces_of.replace(_OPEN, "").replace(_CLOSE, "") == text
        if unchanged and [piece.group(1) for piece in pieces] == [content for _, content in texts]:
            starts = [piece.start() - 2 * number for number, piece in enumerate(pieces)]
            return text, [(start, start + len(content), role) for start, (role, content) in zip(starts, texts)]
    raise ValueError("processor: its chat template changes or leaves out contents, so their place cannot be told")


def _repeated(plain: list[int], roles: list[str], ids: list[int], placeholders: frozenset[int]) -> list[str]:
    """Roles of `ids`, which are the tokens `plain` with placeholders repeated."""
    found, taken = [], 0
    for position, token in enumerate(ids):
        if taken < len(plain) and token == plain[taken]:
            found.append(roles[taken])
            taken += 1
        elif token in placeholders and position and ids[position - 1] in placeholders:
            found.append("")
        else:
            break
    if len(found) != len(ids) or taken != len(plain):
        raise ValueError("processor: it inserts tokens other than image placeholders, so the others' roles are unknown")
    return found
