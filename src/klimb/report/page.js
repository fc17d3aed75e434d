// Draws the charts and filters the table of draws. Everything it shows is in the page already.
"use strict";

const specs = JSON.parse(document.getElementById("charts").textContent);
for (const [name, spec] of Object.entries(specs)) {
  // ast: expressions are interpreted, so that the page's policy need not allow eval
  vegaEmbed(`#chart-${name}`, spec, { actions: false, renderer: "svg", ast: true });
}

const filters = document.getElementById("filters");
if (filters) {
  const { show, who, prompt, search } = filters.elements;
  const count = document.getElementById("count");
  const rows = [...document.querySelectorAll("#draws tbody tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());

  const update = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !(
        (show.value === "all" || row.dataset.extreme) &&
        (!who.value || row.dataset.who === who.value) &&
        (!prompt.value || row.dataset.prompt === prompt.value) &&
        words.every((word) => texts[i].includes(word))
      );
      shown += !row.hidden;
    });
    count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} draws shown`;
  };
  // who looks for something looks among all of them
  for (const field of [search, prompt]) field.addEventListener("input", () => { show.value = "all"; update(); });
  for (const field of [show, who]) field.addEventListener("input", update);
  filters.addEventListener("submit", (event) => event.preventDefault());
  update();
}
