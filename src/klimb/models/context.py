"""A prompt under a context that the model sees before it: a system prompt, a document, instructions."""

from __future__ import annotations

from klimb.data import Prompt


def in_context(prompt: Prompt, context: str) -> Prompt:
    r"""The prompt with the context before it: as its system message if it is a chat, else as text and an empty line.

    Example:
        >>> in_context("Hi.", "Be brief.")
        'Be brief.\n\nHi.'
        >>> in_context([{"role": "user", "content": "Hi."}], "Be brief.")
        [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi.'}]
    """
    if isinstance(prompt, str):
        return f"{context}\n\n{prompt}"
    first, *others = prompt
    if first["role"] == "system":
        return [{**first, "content": f"{context}\n\n{first['content']}"}, *others]
    return [{"role": "system", "content": context}, *prompt]
