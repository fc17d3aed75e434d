// What the sliders do: the state, and everything that is shown of it.
"use strict";

const given = JSON.parse(document.getElementById("given").textContent);
const at = (id) => document.getElementById(id);
const put = (id, text) => (at(id).textContent = text);
const round = (x, digits = 2) => (Number.isFinite(x) ? (Math.round(x * 10 ** digits) / 10 ** digits + 0).toFixed(digits).replace("-", "−") : "∞");
const percent = (x) => `${round(100 * x, x < 0.0995 && x > 0 ? 1 : 0)} %`;

/** An element with properties and children; text is text, never markup. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const WORDS = ["It was fine.", "It was okay.", "I liked it.", "A quiet wonder.", "Great, great, great!", "I want my money back."];
const state = {
  ref: [34, 26, 20, 6, 4, 10],
  reward: [0.2, 0, 1, 1.8, 2.2, -1],
  pi: [20, 15, 40, 12, 8, 5],
  beta: 0.5,
};
const KINDNESS = [0.3, 0, 1, 0.6, -0.5, -1];
const current = () => ({ logRef: lawOf(state.ref), logPi: lawOf(state.pi), reward: state.reward, beta: state.beta });

// Chapter one: a row of sliders and bars for each completion.

const rows = WORDS.map((words, i) => {
  const slider = (name, label, min, max, step) => {
    const value = make("span", { className: "now" });
    const input = make("input", { type: "range", min, max, step, value: state[name][i], ariaLabel: `${label} of ${words}` });
    input.addEventListener("input", () => {
      state[name][i] = Number(input.value);
      update("says");
    });
    return { box: make("label", {}, make("span", {}, `${label} `, value), input), input, value };
  };
  const parts = {
    ref: slider("ref", "ref", 1, 100, 1),
    reward: slider("reward", "reward", -3, 3, 0.1),
    pi: slider("pi", "π", 0.1, 100, 0.1),
  };
  const bars = Object.fromEntries(
    ["ref", "p", "pi"].map((who) => {
      const bar = make("i");
      const text = make("span");
      return [who, { bar, text, box: make("div", { className: who }, bar, text) }];
    }),
  );
  at("rows").append(
    make("div", { className: "row" }, make("strong", {}, words), parts.ref.box, parts.reward.box, parts.pi.box,
      make("div", { className: "bars" }, bars.ref.box, bars.p.box, bars.pi.box)),
  );
  return { ...parts, bars };
});

const PANEL = [
  ["log Z", "logZ", "nats; what the best policy is normalised by"],
  ["reward of p", "bestReward", "E[r] under the best policy"],
  ["KL(p‖ref)", "bestKl", "nats; what it spends"],
  ["reward of π", "reward", "E[r] under yours"],
  ["KL(π‖ref)", "kl", "nats; what yours spends"],
  ["KL(π‖p)", "toBest", "nats; what training makes small"],
  ["KL(p‖π)", "fromBest", "nats; the other direction: likelihood of p's samples"],
  ["gap", "gap", "β KL(π‖p), units of reward; what is left to climb"],
];
const panel = PANEL.map(([label, key, meaning]) => {
  const value = make("dd", { className: "value", id: `n-${key}` });
  at("numbers").append(make("div", {}, make("dt", {}, label), value, make("dd", { className: "meaning" }, meaning)));
  return [key, value];
});

at("beta").addEventListener("input", () => {
  state.beta = 10 ** Number(at("beta").value);
  update("says");
});
for (const button of document.querySelectorAll("[data-set]")) {
  button.addEventListener("click", () => {
    const { logRef, reward, beta } = current();
    const laws = { ref: logRef, p: best(logRef, reward, beta).logP, even: logRef.map(() => 0) };
    const weights = laws[button.dataset.set].map(Math.exp);
    state.pi = weights.map((w) => (100 * w) / Math.max(...weights));
    update("share");
  });
}

// Charts: drawn once, their rows exchanged.

const FONT = "system-ui, sans-serif";
const look = {
  background: "transparent",
  aria: false,
  font: FONT,
  view: { stroke: null },
  axis: { labelColor: "var(--muted)", titleColor: "var(--ink)", titleFontWeight: "normal", gridColor: "var(--line)", domainColor: "var(--line)", tickColor: "var(--line)", tickCount: 6 },
  legend: { orient: "top", labelColor: "var(--ink)", symbolSize: 90, symbolOpacity: 1, columns: { expr: "width < 500 ? 1 : 3" } },
};
const common = { width: "container", height: 300, config: look, $schema: "https://vega.github.io/schema/vega-lite/v6.json" };
const views = {};

function chart(name, spec) {
  // ast: expressions are interpreted, so that the page's policy need not allow eval
  return vegaEmbed(`#chart-${name}`, { ...common, ...spec }, { actions: false, renderer: "svg", ast: true }).then(({ view }) => {
    views[name] = view;
    update();
  });
}

function redraw(name, data) {
  const view = views[name];
  if (!view) return;
  for (const [rows, values] of Object.entries(data)) view.data(rows, values);
  view.runAsync();
}

const KINDS = ["ref", "p at this β", "π, yours"];
const reach = { x: { field: "kl", type: "quantitative", title: "KL(policy ‖ ref), nats" }, y: { field: "reward", type: "quantitative", title: "E[reward]" } };
const frontierDrawn = chart("frontier", {
  layer: [
    { data: { name: "curve" }, mark: { type: "line", aria: false, stroke: "var(--accent)", strokeWidth: 2.5 }, encoding: { ...reach, order: { field: "kl" } } },
    {
      data: { name: "points" },
      mark: { type: "point", aria: false, filled: true, size: 130, opacity: 1, stroke: "var(--paper)" },
      encoding: {
        ...reach,
        color: { field: "who", type: "nominal", title: null, scale: { domain: KINDS, range: ["var(--muted)", "var(--accent)", "var(--red)"] } },
        shape: { field: "who", type: "nominal", title: null, scale: { domain: KINDS, range: ["square", "diamond", "circle"] } },
      },
    },
  ],
  datasets: { curve: [{ kl: 0, reward: 0 }, { kl: 1, reward: 1 }], points: [{ who: KINDS[0], kl: 0, reward: 0 }] }, // until they are computed
});
const LAWS = ["teacher", "student"];
const studentsDrawn = chart("students", {
  data: { name: "laws" },
  mark: { type: "line", aria: false, strokeWidth: 2.5 },
  encoding: {
    x: { field: "y", type: "quantitative", title: "outcome" },
    y: { field: "chance", type: "quantitative", title: "probability" },
    color: { field: "who", type: "nominal", title: null, scale: { domain: LAWS, range: ["var(--accent)", "var(--red)"] } },
    strokeDash: { field: "who", type: "nominal", title: null, scale: { domain: LAWS, range: [[1, 0], [6, 4]] } },
  },
  datasets: { laws: [{ who: LAWS[0], y: 0, chance: 0 }, { who: LAWS[1], y: 1, chance: 1 }] },
});

// Chapter two: the lines of the derivation, as klimb derive has them.

const cells = given.steps.map((step) => {
  const table = make("table");
  const pairs = step.sides.map(({ left, right }) => {
    const [a, b] = [make("td", { className: "n" }), make("td", { className: "n" })];
    table.append(make("tr", {}, make("td", {}, left), a), make("tr", {}, make("td", {}, `= ${right}`), b));
    return [a, b];
  });
  at("steps").append(
    make("li", {}, make("strong", {}, `(${step.number}) ${step.title}`), make("div", { className: "formula" }, step.formula), table, make("div", { className: "quiet" }, step.why)),
  );
  return pairs;
});
const SAYS = { shift: "shift-says", loss: "student-says", s: "student-says", weight: "student-says", apart: "student-says", t: "prompt-says" };
for (const [id, says] of Object.entries(SAYS)) at(id).addEventListener("input", () => update(says));

const promptLaw = (t) => lawOf(zip(lawOf(state.ref), KINDNESS, (l, k) => Math.exp(l + t * k)));
at("t-best").addEventListener("click", () => {
  const { logRef, reward, beta } = current();
  const { logP } = best(logRef, reward, beta);
  const slider = at("t");
  const steps = range(161).map((i) => -3 + i * 0.05);
  slider.value = steps.reduce((a, b) => (kl(promptLaw(b), logP) < kl(promptLaw(a), logP) ? b : a));
  update("prompt-says");
});

const LOSS_SAYS = {
  forward: "KL(teacher‖student) is a mean over the teacher's samples: the student imitates them.",
  reverse: "KL(student‖teacher) is a mean over the student's own samples: it is told off for what the teacher would not say.",
  jsd: "s KL(teacher‖m) + (1 − s) KL(student‖m), with the mixture m = s · teacher + (1 − s) · student: never infinite.",
  skew: "KL(teacher‖s · teacher + (1 − s) · student): at most −log s, whatever the student lacks.",
  skewReverse: "KL(student‖s · student + (1 − s) · teacher): at most −log s, whatever the teacher never says.",
};

let settling;

/** Tell a screen reader what a paragraph says, once the values have rested: not every step of a slider. */
function announce(id) {
  clearTimeout(settling);
  settling = setTimeout(() => put("settled", id === "share" ? `share attained by π: ${at(id).textContent}` : at(id).textContent), 700);
}

/** Show everything anew; `says` is the paragraph that tells what a change has done. */
function update(says) {
  if (says) announce(says);
  const now = current();
  const found = numbersOf(now);
  const laws = { ref: now.logRef.map(Math.exp), p: found.logP.map(Math.exp), pi: now.logPi.map(Math.exp) };
  put("beta-value", round(state.beta, state.beta < 0.1 ? 3 : 2));
  at("beta").setAttribute("aria-valuetext", at("beta-value").textContent); // the slider itself holds its logarithm
  rows.forEach((row, i) => {
    row.ref.value.textContent = percent(laws.ref[i]);
    row.reward.value.textContent = round(state.reward[i], 1);
    row.pi.value.textContent = percent(laws.pi[i]);
    row.pi.input.value = state.pi[i];
    for (const who of ["ref", "p", "pi"]) {
      row.bars[who].bar.style.width = `${100 * laws[who][i]}%`;
      row.bars[who].text.textContent = percent(laws[who][i]);
    }
  });
  const lifted = laws.p.reduce((a, p, i) => (p - laws.ref[i] > laws.p[a] - laws.ref[a] ? i : a), 0);
  put("says", found.share === null ? "All rewards are alike: the best policy is the reference itself, at every price." : `At this price the best policy says “${WORDS[lifted]}” ${percent(laws.p[lifted])} of the time; the reference does ${percent(laws.ref[lifted])}. It earns ${round(found.bestReward)} where the reference earns ${round(found.refReward)}, and spends ${round(found.bestKl)} nats.`);
  put("left", round(found.objective, 4));
  put("left-parts", `${round(found.reward, 4)} − ${round(state.beta)} · ${round(found.kl, 4)}`);
  put("right", round(state.beta * found.logZ - found.gap, 4));
  put("right-parts", `${round(state.beta * found.logZ, 4)} − ${round(state.beta)} · ${round(found.toBest, 4)}`);
  put("share", found.share === null ? "nothing to climb, all rewards are alike" : percent(found.share));
  at("meter").value = Math.max(0, found.share ?? 1);
  for (const [key, value] of panel) value.textContent = round(found[key], 3);
  redraw("frontier", {
    curve: frontier(now.logRef, now.reward, range(61).map((i) => 10 ** (-1.5 + i * 0.05))),
    points: [
      { who: KINDS[0], kl: 0, reward: found.refReward },
      { who: KINDS[1], kl: found.bestKl, reward: found.bestReward },
      { who: KINDS[2], kl: found.kl, reward: found.reward },
    ],
  });

  derivationOf(now).forEach((pairs, i) => pairs.forEach(([left, right], k) => {
    cells[i][k][0].textContent = round(left, 9);
    cells[i][k][1].textContent = round(right, 9);
  }));
  const shift = Number(at("shift").value);
  const shifted = best(now.logRef, now.reward.map((r) => r + shift), now.beta);
  put("shift-value", round(shift, 1));
  put("shift-says", `log Z goes from ${round(found.logZ, 3)} to ${round(shifted.logZ, 3)}, by c/β = ${round(shift / now.beta, 3)}. The largest change of any p(y) is ${round(Math.max(...zip(shifted.logP, found.logP, (a, b) => Math.abs(Math.exp(a) - Math.exp(b)))), 9)}.`);

  const [share, weight, apart] = ["s", "weight", "apart"].map((id) => Number(at(id).value));
  const teacher = twoBumps(weight, 9, 9 + apart);
  const student = fitted(at("loss").value, teacher, share);
  put("s-value", round(share));
  put("weight-value", percent(weight));
  put("apart-value", apart);
  at("s").disabled = !["jsd", "skew", "skewReverse"].includes(at("loss").value);
  put("loss-says", LOSS_SAYS[at("loss").value]);
  const never = sum(teacher.map((l, y) => (Math.exp(l) < 0.005 ? Math.exp(student.law[y]) : 0)));
  const missed = sum(teacher.map((l, y) => (student.law[y] < l - 3 ? Math.exp(l) : 0)));
  put("student-says", `The student ends at centre ${round(student.centre, 1)}, width ${round(Math.exp(student.logWidth), 1)}; the loss is ${round(student.value, 3)} nats. ${percent(never)} of what it says the teacher hardly ever says; ${percent(missed)} of what the teacher says it hardly ever says.`);
  redraw("students", {
    laws: range(LINE).flatMap((y) => [
      { who: "teacher", y, chance: Math.exp(teacher[y]) },
      { who: "student", y, chance: Math.exp(student.law[y]) },
    ]),
  });

  const t = Number(at("t").value);
  const prompted = promptLaw(t);
  const part = numbersOf({ ...now, logPi: prompted });
  const reached = Math.max(...range(161).map((i) => numbersOf({ ...now, logPi: promptLaw(-3 + i * 0.05) }).share));
  put("t-value", round(t));
  put("prompt-says", part.share === null ? "All rewards are alike: there is nothing to climb." : `With this prompt the model earns ${round(part.reward)} at ${round(part.kl)} nats and has gone ${percent(part.share)} of the way. The best prompt goes ${percent(reached)}: what is left is not a matter of training longer, the family does not hold p.`);
}
update();
Promise.all([frontierDrawn, studentsDrawn]).then(() => (document.documentElement.dataset.ready = "1"));
