// Draws the charts and starts what moves. Everything it shows is in the page already.
"use strict";

(async () => {
  const specs = JSON.parse(document.getElementById("charts").textContent);
  const views = {};
  await Promise.all(Object.entries(specs).map(async ([name, spec]) => {
    // ast: expressions are interpreted, so that the page's policy need not allow eval
    const options = { actions: false, renderer: "svg", ast: true };
    const host = document.getElementById(`chart-${name}`);
    if (!host) return;
    views[name] = (await vegaEmbed(host, spec, options)).view;
    const drawn = host.querySelector("svg"); // the host is the image, and it is named
    drawn.setAttribute("aria-hidden", "true");
    for (const part of drawn.querySelectorAll("[role]")) part.removeAttribute("role");
  }));
  startSlider(views);
  startDraws();
  document.documentElement.dataset.ready = "1";
})();
