"""Which tokens of a conversation are whose: the assistant's, the query's, the context's, padding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Messages = Sequence[Mapping[str, Any]]

# Private-use characters around every piece of content while its place in the rendered conversation is looked up.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


@dataclass(frozen=True)
class TokenRoles:
    """A batch of conversations in tokens, with a boolean mask (b, t) for each role.

    assistant: what assistants say. context: documents or images that are talked about. query: what asks about them.
    """

    input_ids: Int[Tensor, "b t"]
    attention_mask: Int[Tensor, "b t"]
    assistant: Bool[Tensor, "b t"]
    query: Bool[Tensor, "b t"]
    context: Bool[Tensor, "b t"]

    @property
    def pad(self) -> Bool[Tensor, "b t"]:
        """Where there is only padding."""
        return self.attention_mask == 0

    @property
    def batch(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @classmethod
    def from_messages(
        cls,
        tokenizer: Any,
        conversations: Iterable[Messages],
        *,
        query: Literal["user_content", "non_assistant"] = "user_content",
        context_token_ids: Iterable[int] = (),
        max_length: int = 4096,
        padding_side: Literal["left", "right"] = "left",
    ) -> TokenRoles:
        """Conversations through the tokenizer's chat template, roles by character offset, cut at `max_length` tokens.

        A message is {"role", "content"}; content is a text, or a list of {"type": "text" | "context", "text": …} of
        which the "context" parts are context. context_token_ids: tokens that are context wherever they stand (image
        placeholders). query: "user_content" = the other text of user messages; "non_assistant" = every token that is
        neither assistant nor context, with template, system and start tokens (as ScalSelect's code does). Assistant
        tokens are those that the template marks ({% generation %}), else those of the assistants' contents.
        Needs a fast tokenizer with a chat template. Raises ValueError otherwise, and where a template changes the
        contents.
        """
        if query not in ("user_content", "non_assistant"):
            raise ValueError(f"query: 'user_content' or 'non_assistant', got {query!r}")
        if not getattr(tokenizer, "is_fast", False) or not getattr(tokenizer, "chat_template", None):
            raise ValueError("tokenizer: a fast tokenizer with a chat template is needed")
        placeholders = frozenset(context_token_ids)
        rows = [_roles(tokenizer, messages, query, placeholders, max_length) for messages in conversations]
        if not rows:
            raise ValueError("conversations: at least one is needed, got none")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        length = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, fill: int, dtype: torch.dtype) -> Tensor:
            filled = [[fill] * (length - len(row[name])) for row in rows]
            pairs = [
                (fill, row[name]) if padding_side == "left" else (row[name], fill) for fill, row in zip(filled, rows)
            ]
            return torch.tensor([[*before, *after] for before, after in pairs], dtype=dtype)

        return cls(
            input_ids=padded("input_ids", pad, torch.long),
            attention_mask=padded("present", 0, torch.long),
            assistant=padded("assistant", 0, torch.bool),
            query=padded("query", 0, torch.bool),
            context=padded("context", 0, torch.bool),
        )


def _roles(
    tokenizer: Any, messages: Messages, query: str, placeholders: frozenset[int], max_length: int
) -> dict[str, list[int]]:
    """Token ids and 0/1 roles of one conversation."""
    plain, text, spans = _rendered(tokenizer, messages)
    limits = {"truncation": True, "max_length": max_length}
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **limits)
    ids = list(encoded["input_ids"])
    roles = _roles_of_tokens(encoded["offset_mapping"], spans)
    assistant = _marked_by_template(tokenizer, plain, ids, limits) or [int(role == "assistant") for role in roles]
    about = [role == "context" or token in placeholders for role, token in zip(roles, ids)]
    context = [int(inside and not spoken) for inside, spoken in zip(about, assistant)]
    free = [not (spoken or inside) for spoken, inside in zip(assistant, context)]
    asked = [int(other and (query == "non_assistant" or role == "user")) for other, role in zip(free, roles)]
    return {"input_ids": ids, "present": [1] * len(ids), "assistant": assistant, "query": asked, "context": context}


def _rendered(tokenizer: Any, messages: Messages) -> tuple[list[dict[str, Any]], str, list[tuple[int, int, str]]]:
    """(messages with plain contents, the conversation as the template renders it, [(start, end, role)] in characters).

    Found by rendering once more with marks around the contents; contents are stripped where the template does so.
    """
    given = _parts(messages)
    for parts in (given, [(index, role, text.strip()) for index, role, text in given]):
        plain = [{**message, "content": _joined(parts, index, "", "")} for index, message in enumerate(messages)]
        marked = [
            {**message, "content": _joined(parts, index, _OPEN, _CLOSE)} for index, message in enumerate(messages)
        ]
        text = tokenizer.apply_chat_template(plain, tokenize=False)
        with_marks = tokenizer.apply_chat_template(marked, tokenize=False)
        pieces = list(re.finditer(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}", with_marks))
        unchanged = with_marks.replace(_OPEN, "").replace(_CLOSE, "") == text
        if unchanged and [piece.group(1) for piece in pieces] == [content for _, _, content in parts]:
            starts = [piece.start() - 2 * number for number, piece in enumerate(pieces)]
            return plain, text, [(start, start + len(part[2]), part[1]) for start, part in zip(starts, parts)]
    raise ValueError("tokenizer: its chat template changes or leaves out contents, so their place cannot be told")


def _parts(messages: Messages) -> list[tuple[int, str, str]]:
    """(message, role, text) of every part."""
    found = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ValueError(f"conversations: message {index} has no role")
        pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(pieces, list | tuple) or not pieces:
            raise ValueError(
                f"conversations: message {index} needs a text or a list of parts as content, got {content!r}"
            )
        for piece in pieces:
            kind, text = piece.get("type"), piece.get("text")
            if kind not in ("text", "context") or not isinstance(text, str):
                raise ValueError(f"conversations: message {index} has a part that is no text or context: {piece!r}")
            if _OPEN in text or _CLOSE in text:
                raise ValueError(
                    f"conversations: message {index} holds a reserved private-use character (U+E0F0, U+E0F1)"
                )
            found.append((index, "context" if kind == "context" else role, text))
    return found


def _joined(parts: list[tuple[int, str, str]], index: int, before: str, after: str) -> str:
    return "\n".join(f"{before}{text}{after}" for owner, _, text in parts if owner == index)


def _roles_of_tokens(offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int, str]]) -> list[str]:
    """The role of each token: that of the first span which it overlaps, "" for none."""
    roles, current = [], 0
    for start, end in offsets:
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        overlaps = start < end and current < len(spans) and spans[current][0] < end
        roles.append(spans[current][2] if overlaps else "")
    return roles


def _marked_by_template(
    tokenizer: Any, messages: Messages, ids: list[int], limits: Mapping[str, Any]
) -> list[int] | None:
    """The assistant mask where the template provides one."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return None
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **limits
    )
    return list(encoded["assistant_masks"]) if list(encoded["input_ids"]) == ids else None
