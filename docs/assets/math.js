// Formulas between \( \) and \[ \], as the Markdown extension arithmatex leaves them, drawn by KaTeX.
renderMathInElement(document.body, {
  delimiters: [
    { left: "\\(", right: "\\)", display: false },
    { left: "\\[", right: "\\]", display: true },
  ],
  macros: { "\\KL": "\\mathrm{KL}", "\\ref": "\\mathrm{ref}", "\\E": "\\mathbb{E}" },
});
document.fonts.ready.then(() => {
  for (const formula of document.querySelectorAll("div.arithmatex")) {
    if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0; // one that scrolls, scrolls by keys too
  }
});
