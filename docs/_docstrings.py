"""Read by mkdocstrings (mkdocs.yml): two habits of this house's docstrings, told in the words of the parser.

`Example:` becomes `Examples:`, which alone is shown as code, and shapes such as [P][G] are code, not a Markdown link.
"""

import re

import griffe


class House(griffe.Extension):
    """Changes the text of each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Once for each module, class, function and attribute."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"(?<![`\w])\[\w+\]\[[A-Z]\]", r"`\g<0>`", text)
