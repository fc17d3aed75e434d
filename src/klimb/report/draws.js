// The draws that the page carries: a table that is searched, filtered and sorted, and one prompt's side by side.
"use strict";

function startDraws() {
  const source = document.getElementById("draws-data");
  const form = document.getElementById("filters");
  if (!source || !form) return;
  const data = JSON.parse(source.textContent);
  const rows = data.rows.map(([who, p, text, more, reward, ratio, weight, finished, extreme, lengths, ratios]) => ({
    who: who ? "reference" : "policy", p, text, more, reward: reward ?? -Infinity, ratio, weight, finished, extreme, lengths, ratios,
    words: `${text}\n${data.prompts[p]}`.toLowerCase(),
  }));

  // Tokens

  const SCALE = 10; // of the stored whole numbers: tenths of a nat
  const whole = (base64) => Int8Array.from(atob(base64), (c) => c.charCodeAt(0));
  function coloured(row) {
    if (!row.lengths) return completion(row.text, row.more, row.finished);
    const letters = Array.from(row.text), lengths = whole(row.lengths), ratios = whole(row.ratios);
    const made = said("");
    let start = 0;
    lengths.forEach((signed, i) => {
      const length = signed & 255, ratio = ratios[i] / SCALE;
      const step = Math.min(Math.ceil(Math.abs(ratio)  - 0.5), 3);
      const text = letters.slice(start, start + length).join("");
      start += length;
      if (!text) return;
      if (step < 1) made.append(text);
      else made.append(element("span", { className: `${ratio > 0 ? "up" : "down"}${step}`, title: `${ratio > 0 ? "+" : ""}${fixed(ratio, 1)} nats` }, text));
    });
    if (start < letters.length) made.append(letters.slice(start).join(""));
    return [made, completion("", row.more, row.finished)[1]];
  }
  const spoken = (row) => element("div", {}, ...coloured(row).filter(Boolean));
  const tag = (row) => element("span", { className: `tag ${row.who}` }, row.who);

  // The table

  const columns = [
    { title: "reward", number: true, help: "in its own units", value: (row) => row.reward, cell: (row) => fixed(row.reward, 3) },
    { title: "drawn by", value: (row) => row.who, cell: tag },
    { title: "prompt", value: (row) => row.p, cell: (row) => said(data.prompts[row.p], "text prompt") },
    { title: "completion", value: (row) => row.text, cell: spoken },
    { title: "log π − log ref", number: true, help: "log-probability under the policy less that under the reference, nats", value: (row) => row.ratio, cell: (row) => fixed(row.ratio) },
    { title: "weight", number: true, help: "how much likelier the best policy says it than the one that drew it, at the run's beta", value: (row) => row.weight, cell: (row) => (row.weight == null ? "" : `${brief(row.weight)} ×`) },
  ].filter((column) => !column.number || rows.some((row) => column.value(row) != null)); // a plan's draws have no log π
  const table = pagedTable(document.getElementById("draws-table"), { label: "Draws in this page", columns, sort: [0, true], empty: "No draw matches." });
  const { search, show, who, prompt, from, to, least } = form.elements;
  const count = document.getElementById("count");
  const limit = (field, otherwise) => (field.value === "" || Number.isNaN(Number(field.value)) ? otherwise : Number(field.value));

  function update() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const [low, high, weight] = [limit(from, -Infinity), limit(to, Infinity), limit(least, null)];
    const found = rows.filter((row) =>
      (show.value !== "extreme" || row.extreme) &&
      (!who.value || row.who === who.value) &&
      (prompt.value === "" || row.p === Number(prompt.value)) &&
      row.reward >= low && row.reward <= high &&
      (weight === null || (row.weight ?? -1) >= weight) &&
      words.every((word) => row.words.includes(word)));
    table.show(found);
    count.textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} draws shown`;
  }
  // who looks for something looks among all of them
  for (const field of [search, prompt, from, to, least]) {
    field.addEventListener("input", () => { if (show.value === "extreme") show.value = "all"; update(); });
  }
  who.addEventListener("input", update);
  show.addEventListener("input", () => {
    if (show.value === "new") { who.value = "policy"; table.sortBy(4, true); }
    if (show.value === "weight") { who.value = ""; table.sortBy(5, true); }
    if (show.value === "extreme" || show.value === "all") table.sortBy(0, true);
    update();
  });
  form.addEventListener("reset", () => setTimeout(() => { table.sortBy(0, true); update(); }));
  form.addEventListener("submit", (event) => event.preventDefault());
  if (show.value === "new") who.value = "policy";
  update();

  // Side by side

  const chosen = document.getElementById("beside-prompt");
  if (!chosen) return;
  const beside = document.getElementById("beside");
  function compare() {
    const columns = ["policy", "reference"].map((name) => {
      const own = rows.filter((row) => row.who === name && row.p === Number(chosen.value)).sort((a, b) => b.reward - a.reward).slice(0, 8);
      const items = own.map((row) => element("li", {},
        element("span", { className: "quiet" }, `reward ${fixed(row.reward, 3)}${row.ratio == null ? "" : ` · log π − log ref ${fixed(row.ratio)}`}`), spoken(row)));
      return element("div", {}, element("h4", {}, tag({ who: name })), items.length ? element("ol", {}, ...items) : element("p", { className: "missing" }, "None in this page."));
    });
    beside.replaceChildren(...columns);
  }
  chosen.addEventListener("input", compare);
  for (const [id, step] of [["beside-before", -1], ["beside-after", 1]]) {
    document.getElementById(id).addEventListener("click", () => {
      chosen.selectedIndex = (chosen.selectedIndex + step + chosen.options.length) % chosen.options.length;
      compare();
    });
  }
  compare();
}
