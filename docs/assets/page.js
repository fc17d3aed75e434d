// Formulas between \( \) and \[ \], as the Markdown extension arithmatex leaves them, drawn by KaTeX.
renderMathInElement(document.body, {
  delimiters: [
    { left: "\\(", right: "\\)", display: false },
    { left: "\\[", right: "\\]", display: true },
  ],
  macros: { "\\KL": "\\mathrm{KL}", "\\ref": "\\mathrm{ref}", "\\E": "\\mathbb{E}" },
});
// A formula or a table that scrolls can be reached, and so scrolled, by keys.
const reachable = () => {
  for (const one of document.querySelectorAll("div.arithmatex, .md-typeset__scrollwrap")) {
    if (one.scrollWidth > one.clientWidth) one.tabIndex = 0;
  }
};
document.fonts.ready.then(reachable);
addEventListener("load", reachable);
addEventListener("resize", reachable);
