// Exercises: each makes its numbers from a seed, and computes what is right when it is asked.
"use strict";

const pick = (random, values) => values[Math.floor(random() * values.length)];
const shuffled = (random, values) => values.map((x) => [random(), x]).sort((a, b) => a[0] - b[0]).map(([, x]) => x);
const words = (values, digits = 2) => values.map((x) => round(x, digits)).join(", ");

/** A small problem of a seed: three completions. */
function smallProblem(random) {
  const ref = pick(random, [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.25, 0.25, 0.5]]);
  const reward = shuffled(random, [0, 1, 2]);
  return { logRef: lawOf(ref), reward, beta: pick(random, [0.5, 1, 2]), ref };
}

const choice = (options, right, why) => ({
  kind: "choice",
  options,
  right: [right],
  check: (chosen) => ({ right: chosen.length === 1 && chosen[0] === right, why: why(chosen[0]) }),
});

const EXERCISES = [
  {
    id: "why-z",
    title: "Why may log Z be dropped?",
    make(random) {
      const { logRef, reward, beta } = smallProblem(random);
      const logPi = lawOf([0.2, 0.5, 0.3]);
      const lines = derivationOf({ logRef, reward, logPi, beta });
      const [whole, without] = lines[5][0];
      const why = (chosen) =>
        `${chosen === 0 ? "Yes" : ["", "It is anything from very small to very large: here log Z = ", "The rewards matter: they made p. Here log Z = ", "Z differs from prompt to prompt; that is why it stays inside the mean over x. Here log Z = "][chosen] + round(best(logRef, reward, beta).logZ)}. Z is made of ref, r and β; θ is in none of them, so its gradient is zero: with log Z the gradient's norm is ${round(whole, 6)}, without it ${round(without, 6)}. It still measures the distance left: dropped from training, not from measuring.`;
      return {
        asks: "Step (6) drops log Z(x) from KL(π‖p) − log Z(x). What allows it?",
        ...choice(["The policy's parameters are not in it, so its gradient is zero", "It is small", "The rewards do not matter any more", "It is the same for every prompt"], 0, why),
      };
    },
  },
  {
    id: "order",
    title: "Put the derivation in order",
    make(random) {
      let order = shuffled(random, given.steps.map((s) => s.number));
      while (failing(order) === null) order = shuffled(random, order);
      return {
        kind: "order",
        asks: "From the objective to what is minimised: each step may use only those above it.",
        options: order.map((n) => ({ n, words: given.steps[n - 1].title })),
        right: [1, 2, 3, 4, 5, 6],
        check(chosen) {
          const lacks = failing(chosen);
          if (lacks === null) return { right: true, why: "Each step has what it needs. (3) only gives names, so it may stand anywhere before (4)." };
          const [step, needs] = lacks;
          return { right: false, why: `“${given.steps[step - 1].title}” stands before “${given.steps[needs - 1].title}”, which it needs. ${given.steps[needs - 1].why}` };
        },
      };
    },
  },
  {
    id: "larger-beta",
    title: "Another β",
    make(random) {
      const { logRef, reward, beta, ref } = smallProblem(random);
      const at = (b) => {
        const { logP, logZ } = best(logRef, reward, b);
        return { reward: mean(logP, reward), kl: kl(logP, logRef), value: b * logZ };
      };
      const dearer = random() < 0.5;
      const other = dearer ? 2 * beta : beta / 2;
      const [before, after] = [at(beta), at(other)];
      const said = [
        ["E_p[r] falls", after.reward < before.reward],
        ["E_p[r] rises", after.reward > before.reward],
        ["KL(p‖ref) falls", after.kl < before.kl],
        ["KL(p‖ref) rises", after.kl > before.kl],
        ["β log Z falls", after.value < before.value],
      ];
      const right = said.flatMap(([, yes], i) => (yes ? [i] : []));
      return {
        kind: "several",
        asks: `ref = (${words(ref)}), r = (${words(reward, 0)}). β goes from ${beta} to ${other}. What happens to the best policy? Choose all that are true.`,
        options: said.map(([text]) => text),
        right,
        check: (chosen) => ({
          right: JSON.stringify([...chosen].sort()) === JSON.stringify(right),
          why: `A nat costs ${dearer ? "more, so p stays nearer to ref" : "less, so p goes further from ref"}: E_p[r] goes from ${round(before.reward, 3)} to ${round(after.reward, 3)}, KL(p‖ref) from ${round(before.kl, 3)} to ${round(after.kl, 3)}, β log Z from ${round(before.value, 3)} to ${round(after.value, 3)}${dearer ? ", towards" : ", away from"} E_ref[r] = ${round(mean(logRef, reward), 3)}.`,
        }),
      };
    },
  },
  {
    id: "two-directions",
    title: "Reading the two directions",
    make(random) {
      const teacher = twoBumps(0.55 + 0.2 * random(), 9, 24);
      const dropped = random() < 0.5;
      const { law } = fitted(dropped ? "reverse" : "forward", teacher);
      const [out, back] = [kl(law, teacher), kl(teacher, law)];
      return {
        asks: `A policy was trained towards p. Measured: KL(π‖p) = ${round(out)} nats, KL(p‖π) = ${round(back)} nats. What has it done?`,
        ...choice(
          ["It left out something that p does", "It does much that p never does", "It is p"],
          back > out ? 0 : 1,
          () => `KL(p‖π) is a mean under p and is large where p has mass and π has none (left out); KL(π‖p) is a mean under π and is large where π says what p never would. Here ${back > out ? "KL(p‖π) is the larger: a mode was dropped" : "KL(π‖p) is the larger: it covers too much"}.`,
        ),
      };
    },
  },
  {
    id: "compute",
    title: "Compute a target policy",
    make(random) {
      const { logRef, reward, beta, ref } = smallProblem(random);
      const i = Math.floor(3 * random());
      const { logP } = best(logRef, reward, beta);
      const weights = zip(ref, reward, (q, r) => q * Math.exp(r / beta));
      return {
        kind: "number",
        asks: `ref = (${words(ref)}), r = (${words(reward, 0)}), β = ${beta}. What is p of the ${["first", "second", "third"][i]} completion? Two decimals.`,
        right: Math.exp(logP[i]),
        check: (x) => ({
          right: Math.abs(x - Math.exp(logP[i])) <= 0.0051,
          why: `ref · exp(r/β) is (${words(weights, 3)}); their sum Z is ${round(sum(weights), 3)}; p is (${words(logP.map(Math.exp), 3)}).${Math.abs(x - weights[i]) < 0.006 ? " You left out the division by Z." : Math.abs(x - Math.exp(best(logRef, reward, 1 / beta).logP[i])) < 0.006 && beta !== 1 ? " That is the p of 1/β: the reward is divided by β." : ""}`,
        }),
      };
    },
  },
  {
    id: "variant",
    title: "What does this objective do?",
    make(random) {
      const names = shuffled(random, given.variants);
      const [asked, ...others] = names;
      const options = shuffled(random, [asked, ...others.slice(0, 2)]);
      return {
        asks: `Somebody writes ${asked.formula} in the place of max E_x[ E_π[r] − β KL(π‖ref) ]. What is true of it?`,
        ...choice(options.map((o) => o.says), options.indexOf(asked), (chosen) => (options[chosen] === asked ? `Yes: klimb derive --check ${asked.name} shows it on numbers.` : `That is said of ${options[chosen].formula}. Of this one: ${asked.says}`)),
      };
    },
  },
  {
    id: "loss",
    title: "Choose a distillation loss",
    make(random) {
      const safe = random() < 0.5;
      const teacher = twoBumps(0.6, 9, 24);
      const names = ["forward", "reverse"];
      const measured = names.map((name) => {
        const { law } = fitted(name, teacher);
        const never = sum(teacher.map((l, y) => (Math.exp(l) < 0.005 ? Math.exp(law[y]) : 0)));
        const missed = sum(teacher.map((l, y) => (law[y] < l - 3 ? Math.exp(l) : 0)));
        return { never, missed };
      });
      const [a, b] = measured.map((m) => (safe ? m.never : m.missed));
      return {
        asks: `A student is too small for its teacher. What matters is that it ${safe ? "never says what the teacher would not say" : "can still do everything that the teacher does"}. Which loss?`,
        ...choice(["KL(teacher‖student), on the teacher's samples", "KL(student‖teacher), on the student's own samples"], a < b ? 0 : 1, () => `On the two habits of the chapter on students: of what the student says, the teacher hardly ever says ${percent(measured[0].never)} with KL(teacher‖student) and ${percent(measured[1].never)} with KL(student‖teacher); of what the teacher says, the student hardly ever says ${percent(measured[0].missed)} and ${percent(measured[1].missed)}.`),
      };
    },
  },
  {
    id: "soften",
    title: "A loss that stays finite",
    make(random) {
      const [p, s] = [pick(random, [0.5, 0.6, 0.7, 0.8, 0.9]), pick(random, [0.1, 0.25, 0.5])];
      const [teacher, student] = [lawOf([p, 1 - p]), lawOf([1, 0])];
      const name = pick(random, ["jsd", "skew", "skewReverse"]);
      const [m, other] = [s, 1 - s].map((x) => mixture(teacher, student, x));
      const formula = {
        jsd: `s KL(teacher‖m) + (1 − s) KL(student‖m), m = s · teacher + (1 − s) · student`,
        skew: `KL(teacher‖m), m = s · teacher + (1 − s) · student`,
        skewReverse: `KL(student‖m), m = s · student + (1 − s) · teacher`,
      }[name];
      const right = LOSSES[name](teacher, student, s);
      const mixed = (name === "skewReverse" ? other : m).map(Math.exp);
      const turned = LOSSES[name](teacher, student, 1 - s);
      const most = name === "jsd" ? -s * Math.log(s) - (1 - s) * Math.log(1 - s) : -Math.log(s);
      return {
        kind: "number",
        asks: `The teacher says two things with chances (${round(p, 1)}, ${round(1 - p, 1)}), the student only the first: (1, 0). What is ${formula}, at s = ${s}? Nats, two decimals.`,
        right,
        check: (x) => ({
          right: Math.abs(x - right) <= 0.0051,
          why: `m is (${words(mixed, 3)}), which lacks nothing, and the loss is ${round(right, 3)}. KL(teacher‖student) is infinite here: the student never says the second. With m in its place no loss can pass ${round(most, 3)}.${s !== 0.5 && Math.abs(x - turned) <= 0.0051 ? " You exchanged s and 1 − s." : ""}`,
        }),
      };
    },
  },
  {
    id: "share",
    title: "What the share does",
    make(random) {
      const [name, s] = pick(random, [["jsd", 0.05], ["jsd", 0.95], ["skew", 0.05], ["skewReverse", 0.05]]);
      const teacher = twoBumps(0.5 + 0.15 * random(), 9, 24); // with a rarer habit a skew of 0.05 gives it up: it costs at most its chance times -log s
      const [own, forward, reverse] = [[name, s], ["forward"], ["reverse"]].map(([loss, share]) => fitted(loss, teacher, share));
      const near = (end) => Math.abs(own.logWidth - end.logWidth);
      const said = {
        jsd: `generalized Jensen–Shannon, s KL(teacher‖m) + (1 − s) KL(student‖m) with m = s · teacher + (1 − s) · student`,
        skew: `the skew KL(teacher‖s · teacher + (1 − s) · student)`,
        skewReverse: `the skew KL(student‖s · student + (1 − s) · teacher)`,
      }[name];
      const limit = { jsd: s < 0.5 ? "m is nearly the student, and the loss nearly s KL(teacher‖student)" : "m is nearly the teacher, and the loss nearly (1 − s) KL(student‖teacher)", skew: "m is nearly the student, and the loss nearly KL(teacher‖student)", skewReverse: "m is nearly the teacher, and the loss nearly KL(student‖teacher)" }[name];
      return {
        asks: `A student of one habit learns from a teacher of two by ${said}, s = ${s}. Where does it end?`,
        ...choice(["Over both habits, as with KL(teacher‖student)", "In one habit, as with KL(student‖teacher)"], near(forward) < near(reverse) ? 0 : 1, () => `At s = ${s} ${limit}. It ends with width ${round(Math.exp(own.logWidth), 1)}; KL(teacher‖student) with ${round(Math.exp(forward.logWidth), 1)}, KL(student‖teacher) with ${round(Math.exp(reverse.logWidth), 1)}.`),
      };
    },
  },
  {
    id: "mediocre",
    title: "Why did it hardly improve?",
    make(random) {
      const { logRef, reward } = smallProblem(random);
      const cause = pick(random, [0, 1]);
      const beta = cause === 0 ? 4 : 0.4;
      const { logP } = best(logRef, reward, beta);
      const mixed = (s) => zip(logRef, logP, (r, p) => (1 - s) * r + s * p);
      const logPi = lawOf(mixed(cause === 0 ? 0.75 + 0.15 * random() : 0.08 + 0.12 * random()).map(Math.exp));
      const m = numbersOf({ logRef, reward, logPi, beta });
      return {
        asks: `After training at β = ${beta}: reward ${round(m.reward)} (reference ${round(m.refReward)}), KL to ref ${round(m.kl, 3)} nats. The plan said that the best policy at this β earns ${round(m.bestReward)} at ${round(m.bestKl, 3)} nats. Why is the reward so low?`,
        ...choice(
          ["β is too high: the best policy itself is mediocre", "Training stopped early or its steps are too small: the best policy is far away", "The reward is wrong"],
          m.share > 0.5 ? 0 : 1,
          () => `It went ${percent(m.share)} of the way from ref to p, and p earns ${round(m.bestReward)}. ${m.share > 0.5 ? "It is nearly there; only a smaller β can earn more, for more nats." : "There is much left to climb at this very β: train longer, or with a larger rate."} klimb diagnose tells them apart on a real run.`,
        ),
      };
    },
  },
];

/** The first step of an order that lacks another, and which; null if none does. */
function failing(order) {
  for (const [place, step] of order.entries()) {
    for (const needed of given.needs[step] || []) if (!order.slice(0, place).includes(needed)) return [step, needed];
  }
  return null;
}

const solved = new Set();

function exercise({ id, title, make: build }) {
  const box = make("form", { className: "exercise", id: `exercise-${id}` });
  let seed = 1;
  const show = () => {
    const made = build(randomFrom(seed));
    const answer = make("p", { className: "answer" });
    answer.setAttribute("role", "status");
    let read;
    let body;
    if (made.kind === "number") {
      const input = make("input", { type: "number", step: "any", min: 0 });
      input.setAttribute("aria-label", made.asks);
      body = make("fieldset", {}, make("legend", {}, made.asks), input);
      read = () => (input.value === "" ? null : Number(input.value));
    } else if (made.kind === "order") {
      let order = made.options;
      const list = make("ol");
      const draw = (focus) => {
        list.replaceChildren(
          ...order.map(({ n, words: text }, i) => {
            const move = (by, sign, what) => {
              const button = make("button", { type: "button", disabled: !(i + by in order) }, sign);
              button.setAttribute("aria-label", `move ${what}: ${text}`);
              button.addEventListener("click", () => {
                order = [...order];
                [order[i], order[i + by]] = [order[i + by], order[i]];
                draw([i + by, by]);
              });
              return button;
            };
            const up = move(-1, "↑", "up");
            const down = move(1, "↓", "down");
            const item = make("li", { value: i + 1 }, make("span", {}, text), make("span", { className: "moves" }, up, " ", down));
            item.dataset.step = n;
            if (focus && focus[0] === i) setTimeout(() => (focus[1] < 0 && !up.disabled ? up : down.disabled ? up : down).focus());
            return item;
          }),
        );
      };
      draw();
      body = make("fieldset", {}, make("legend", {}, made.asks), list);
      read = () => order.map(({ n }) => n);
    } else {
      const type = made.kind === "several" ? "checkbox" : "radio";
      const inputs = made.options.map((_, i) => make("input", { type, name: id, value: String(i) }));
      const places = shuffled(randomFrom(seed + 1000), range(inputs.length)); // the place gives nothing away
      body = make("fieldset", {}, make("legend", {}, made.asks), ...places.map((i) => make("label", {}, inputs[i], make("span", {}, made.options[i]))));
      read = () => {
        const chosen = inputs.flatMap((input, i) => (input.checked ? [i] : []));
        return chosen.length ? chosen : null;
      };
    }
    const again = make("button", { type: "button" }, "other numbers");
    again.addEventListener("click", () => {
      seed += 1;
      show();
      box.querySelector("input, button").focus();
    });
    box.onsubmit = (event) => {
      event.preventDefault();
      const given_ = read();
      if (given_ === null) {
        answer.className = "answer";
        answer.textContent = "Give an answer first.";
        return;
      }
      const { right, why } = made.check(given_);
      if (right) solved.add(id);
      answer.className = `answer ${right ? "right" : "wrong"}`;
      answer.replaceChildren(make("strong", {}, right ? "✓ Right." : "✗ Not quite."), why);
      put("solved", `${solved.size} of ${EXERCISES.length} solved.`);
    };
    box.replaceChildren(make("h3", {}, title), body, make("button", { type: "submit" }, "check"), " ", again, answer);
    box.made = made;
  };
  show();
  return box;
}
at("list").append(...EXERCISES.map(exercise));
put("solved", `0 of ${EXERCISES.length} solved.`);
