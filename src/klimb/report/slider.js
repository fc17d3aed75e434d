// The slider of beta: moves the target along the frontier and computes everything that depends on it from the plan's
// rewards (tilt.js); intervals are interpolated on the plan's grid of betas.
"use strict";

function startSlider(views) {
  const source = document.getElementById("pool");
  const slider = document.getElementById("beta-slider");
  if (!source || !slider) return;
  const pool = JSON.parse(source.textContent);
  const rewards = floats(pool.rewards), G = pool.draws, P = rewards.length / G;
  const weights = new Float64Array(rewards.length);
  const place = (id) => document.getElementById(id);
  const binary = rewards.every((r) => r === 0 || r === 1);

  const sample = pagedTable(place("sample-table"), {
    label: "Draws of the reference, re-weighted",
    sort: [0, true],
    columns: [
      { title: "weight", number: true, help: "how much likelier the best policy says it than the reference does",
        value: (row) => weights[row.at] * G, cell: (row) => `${brief(weights[row.at] * G)} ×` },
      { title: "reward", number: true, help: "in its own units", value: (row) => rewards[row.at], cell: (row) => fixed(rewards[row.at], 3) },
      { title: "prompt", value: (row) => pool.prompts[row.p], cell: (row) => said(pool.prompts[row.p], "text prompt") },
      { title: "completion of the reference", value: (row) => row.text,
        cell: (row) => element("div", {}, ...completion(row.text, row.more).filter(Boolean)) },
    ],
  });
  const texts = pool.rows.map(([p, g, text, more]) => ({ p, at: p * G + g, text, more }));

  const start = Array.from({ length: P }, (_, p) => {
    const own = rewards.subarray(p * G, (p + 1) * G);
    const mean = own.reduce((sum, r) => sum + r, 0) / G;
    const square = own.reduce((sum, r) => sum + (r - mean) ** 2, 0);
    return { p, mean, variance: G > 1 ? square / (G - 1) : null, dead: own.every((r) => r === own[0]) };
  });
  let now = null;
  const of = (name) => (row) => now.prompts[row.p][name];
  const prompts = pagedTable(place("prompt-table"), {
    label: "What each prompt of the plan has to give",
    sort: [4, true],
    columns: [
      { title: "prompt", value: (row) => pool.prompts[row.p],
        cell: (row) => {
          const text = said(pool.prompts[row.p], "text prompt");
          return row.dead ? element("div", {}, text, element("span", { className: "tag dead" }, "dead: all its draws earn the same")) : text;
        } },
      { title: binary ? "pass rate" : "reward", number: true, help: "mean over the reference's draws", value: (row) => row.mean, cell: (row) => fixed(row.mean, 3) },
      { title: "variance", number: true, help: "of the reward, over the reference's draws", value: (row) => row.variance, cell: (row) => brief(row.variance) },
      { title: "best policy's", number: true, help: "E_p[reward] at this beta", value: of("reward"), cell: (row) => fixed(of("reward")(row), 3) },
      { title: "gain", number: true, help: "what the best policy earns more than the reference, at this beta",
        value: (row) => of("reward")(row) - row.mean, cell: (row) => fixed(of("reward")(row) - row.mean, 3) },
      { title: "KL, nats", number: true, help: "KL(p ‖ ref) at this beta", value: of("kl"), cell: (row) => fixed(of("kl")(row)) },
      { title: "log Z, nats", number: true, help: "at this beta", value: of("logZ"), cell: (row) => fixed(of("logZ")(row)) },
      { title: "ESS", number: true, help: "effective draws of this prompt, at most as many as there are", value: of("ess"), cell: (row) => fixed(of("ess")(row), 1) },
    ],
  });

  const decimals = (low, high) => (high > low ? Math.min(Math.max(2, Math.ceil(-Math.log10(high - low))), 8) : 2);
  function tell(id, value, name) {
    const low = value + between(pool.betas, pool.grid[`${name}_low`], now.beta);
    const high = value + between(pool.betas, pool.grid[`${name}_high`], now.beta);
    const d = decimals(low, high);
    const node = place(id);
    node.querySelector("b").textContent = fixed(value, d);
    node.querySelector("small").textContent = `[${fixed(low, d)} to ${fixed(high, d)}]${name === "reward" ? "" : " nats"}`;
    Object.assign(node.dataset, { value, low, high });
  }

  function trust() {
    const k = between(pool.betas, pool.grid.pareto_k, now.beta);
    const short = Math.log(G) - now.kl < MARGIN;
    const said = short
      ? `unreliable: needs about ${Math.max(Math.ceil(Math.exp(now.kl + MARGIN)), G + 1).toLocaleString("en")} draws a prompt, has ${G}`
      : k >= pool.threshold ? `unreliable: Pareto k ${fixed(k)}, not below ${fixed(pool.threshold)}` : "trusted";
    const node = place("live-trust");
    node.querySelector("b").textContent = short || k >= pool.threshold ? "unreliable" : "trusted";
    node.querySelector("small").textContent = said === "trusted" ? "" : said.slice(said.indexOf(":") + 2);
    node.classList.toggle("doubt", said !== "trusted");
    return said;
  }

  function update() {
    const beta = Math.exp(-Number(slider.value));
    now = { beta, ...tilt(rewards, G, beta, weights) };
    tell("live-reward", now.reward, "reward");
    tell("live-kl", now.kl, "kl");
    tell("live-log-z", now.logZ, "log_z");
    place("live-ess").querySelector("b").textContent = fixed(now.ess, 1);
    place("live-ess").dataset.value = now.ess;
    const said = trust();
    place("beta-value").textContent = brief(beta);
    place("beta-value").dataset.beta = beta;
    slider.setAttribute("aria-valuetext", `beta ${brief(beta)}, reward ${fixed(now.reward)}, KL ${fixed(now.kl)} nats, ${said}`);
    const here = [{ kl: now.kl, reward: now.reward, beta: brief(beta), reward_text: fixed(now.reward), kl_text: `${fixed(now.kl)} nats` }];
    views.frontier?.data("here", here).runAsync();
    const spread = histogram(rewards, weights, G, pool.edges);
    const bins = [];
    for (let i = 0; i + 1 < pool.edges.length; i++) {
      for (const [what, shares] of [["reference", spread.ref], ["best policy", spread.p]]) {
        bins.push({ from: pool.edges[i], to: pool.edges[i + 1], what, share: shares[i] });
      }
    }
    views.histogram?.data("bins", bins).runAsync();
    sample.show(texts, false);
    prompts.show(start, false);
  }

  let waiting = false;
  slider.addEventListener("input", () => { // once a frame, however fast it is dragged
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; update(); });
  });
  place("beta-reset").addEventListener("click", () => { slider.value = -Math.log(pool.beta); update(); });
  update();
}
