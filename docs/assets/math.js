// Formulas between \( \) and \[ \], as the Markdown extension arithmatex leaves them, drawn by KaTeX.
renderMathInElement(document.body, {
  delimiters: [
    { left: "\\(", right: "\\)", display: false },
    { left: "\\[", right: "\\]", display: true },
  ],
  macros: { "\\KL": "\\mathrm{KL}", "\\ref": "\\mathrm{ref}", "\\E": "\\mathbb{E}" },
});
