// The formulas of the page: laws as log-probabilities, nats, units of reward. The same as klimb.exact; a test compares them.
"use strict";

const sum = (values) => values.reduce((a, b) => a + b, 0);
const range = (n) => Array.from({ length: n }, (_, i) => i);
const zip = (a, b, f) => a.map((x, i) => f(x, b[i]));

function logSumExp(values) {
  const top = Math.max(...values);
  return top === -Infinity ? top : top + Math.log(sum(values.map((x) => Math.exp(x - top))));
}

/** Weights that need not sum to one -> their law. */
function lawOf(weights) {
  const logs = weights.map(Math.log);
  const whole = logSumExp(logs);
  return logs.map((x) => x - whole);
}

/** E_law[values]; where a law gives no probability a value does not count. */
function mean(law, values) {
  return sum(zip(law, values, (l, v) => (l === -Infinity ? 0 : Math.exp(l) * v)));
}

/** KL(a||b), nats. */
function kl(a, b) {
  return mean(a, zip(a, b, (x, y) => x - y));
}

/** The best policy p = ref exp(r / beta) / Z, and log Z. */
function best(logRef, reward, beta) {
  const target = zip(logRef, reward, (l, r) => l + r / beta);
  const logZ = logSumExp(target);
  return { logP: target.map((x) => x - logZ), logZ };
}

/** J = E_pi[r] - beta KL(pi||ref), units of reward. */
function objective(logPi, logRef, reward, beta) {
  return mean(logPi, reward) - beta * kl(logPi, logRef);
}

/** E_pi[log(pi/ref) - r/beta] = -J/beta, nats. */
function cost(logPi, logRef, reward, beta) {
  return mean(logPi, logPi.map((l, i) => l - logRef[i] - reward[i] / beta));
}

/** The gradient in pi's logits of E_pi[f], f's own gradient having mean zero: pi (f - E_pi f). */
function scoreGradient(logPi, f) {
  const middle = mean(logPi, f);
  return zip(logPi, f, (l, x) => Math.exp(l) * (x - middle));
}

const norm = (values) => Math.sqrt(sum(values.map((x) => x * x)));

/** Everything that the first chapter shows. */
function numbersOf({ logRef, reward, logPi, beta }) {
  const { logP, logZ } = best(logRef, reward, beta);
  const gap = beta * kl(logPi, logP);
  const room = beta * kl(logRef, logP); // beta log Z - E_ref[r]
  return {
    logP,
    logZ,
    bestReward: mean(logP, reward),
    bestKl: kl(logP, logRef),
    refReward: mean(logRef, reward),
    reward: mean(logPi, reward),
    kl: kl(logPi, logRef),
    objective: objective(logPi, logRef, reward, beta),
    toBest: kl(logPi, logP),
    fromBest: kl(logP, logPi),
    gap,
    share: room > 1e-12 ? 1 - gap / room : null, // nothing to climb where all rewards are alike
  };
}

/** Both sides of each equality of each step of the derivation, in the order in which klimb derive has them. */
function derivationOf({ logRef, reward, logPi, beta }) {
  const { logP, logZ } = best(logRef, reward, beta);
  const j = objective(logPi, logRef, reward, beta);
  const c = cost(logPi, logRef, reward, beta);
  const residual = logPi.map((l, i) => l - logRef[i] - reward[i] / beta);
  const withZ = mean(logPi, zip(logPi, logP, (l, p) => l - (logZ + p)));
  const price = logPi.map((l, i) => reward[i] - beta * (l - logRef[i]));
  const pull = zip(logPi, logP, (l, p) => l - p);
  // log Z written with pi, log E_pi[w], w = target / pi. Its gradient has two parts that cancel: the law moves and draws
  // other outcomes, and every weight moves against it. Each is summed by itself.
  const whole = sum(logP.map(Math.exp));
  const byLaw = scoreGradient(logPi, zip(logPi, logP, (l, p) => Math.exp(p - l)));
  const byWeights = zip(logPi, logP, (l, p) => Math.exp(l) * whole - Math.exp(p));
  return [
    [[j, mean(logPi, price)]],
    [[j / -beta, c]],
    [
      [sum(logP.map(Math.exp)), 1],
      [logSumExp(zip(logRef, reward, (l, r) => l + r / beta)), logZ],
    ],
    [[c, withZ]],
    [[withZ, kl(logPi, logP) - logZ]],
    [
      [norm(scoreGradient(logPi, residual)), norm(scoreGradient(logPi, pull))],
      [norm(zip(byLaw, byWeights, (a, b) => a + b)), 0],
    ],
  ];
}

/** The frontier: reward and KL of the best policy of each beta. */
function frontier(logRef, reward, betas) {
  return betas.map((beta) => {
    const { logP } = best(logRef, reward, beta);
    return { beta, kl: kl(logP, logRef), reward: mean(logP, reward) };
  });
}

// Divergences of a teacher's law a and a student's law b.

const mixture = (a, b, share) => zip(a, b, (x, y) => logSumExp([x + Math.log(share), y + Math.log1p(-share)]));

const LOSSES = {
  forward: (a, b) => kl(a, b),
  reverse: (a, b) => kl(b, a),
  jsd: (a, b, share) => share * kl(a, mixture(a, b, share)) + (1 - share) * kl(b, mixture(a, b, share)),
  skew: (a, b, share) => kl(a, mixture(a, b, share)),
  skewReverse: (a, b, share) => kl(b, mixture(b, a, share)),
};

const LINE = 33;

/** One bump on a line of 33 outcomes: a law with a centre and the logarithm of a width. */
function bump(centre, logWidth) {
  const logs = range(LINE).map((y) => -0.5 * ((y - centre) / Math.exp(logWidth)) ** 2);
  const whole = logSumExp(logs);
  return logs.map((x) => x - whole);
}

/** Two bumps of width 2 with the mass `weight` on the first. */
function twoBumps(weight, first, second) {
  const logs = range(LINE).map((y) =>
    logSumExp([
      Math.log(weight) - 0.5 * ((y - first) / 2) ** 2,
      Math.log(1 - weight) - 0.5 * ((y - second) / 2) ** 2,
    ]),
  );
  const whole = logSumExp(logs);
  return logs.map((x) => x - whole);
}

/** Where a function of two numbers is least, from each start downhill (Nelder and Mead, 1965), the best of them. */
function leastOf(value, starts) {
  const reached = starts.map((start) => {
    let points = [start, [start[0] + 1, start[1]], [start[0], start[1] + 0.3]].map((x) => ({ x, f: value(x) }));
    for (let i = 0; i < 400; i++) {
      points.sort((a, b) => a.f - b.f);
      const [low, middle, high] = points;
      if (high.f - low.f < 1e-15 && Math.abs(high.x[0] - low.x[0]) < 1e-9) break;
      const centre = [0, 1].map((k) => (low.x[k] + middle.x[k]) / 2);
      const along = (t) => {
        const x = [0, 1].map((k) => centre[k] + t * (centre[k] - high.x[k]));
        return { x, f: value(x) };
      };
      const reflected = along(1);
      if (reflected.f < low.f) {
        const further = along(2);
        points[2] = further.f < reflected.f ? further : reflected;
      } else if (reflected.f < middle.f) {
        points[2] = reflected;
      } else {
        const nearer = reflected.f < high.f ? along(0.5) : along(-0.5);
        if (nearer.f < Math.min(high.f, reflected.f)) points[2] = nearer;
        else {
          const shrunk = ({ x }) => [0, 1].map((k) => (x[k] + low.x[k]) / 2);
          points = [low, ...[middle, high].map(shrunk).map((x) => ({ x, f: value(x) }))];
        }
      }
    }
    return points.sort((a, b) => a.f - b.f)[0];
  });
  return reached.sort((a, b) => a.f - b.f)[0];
}

/** The student of one bump that a loss ends at, for a teacher's law. */
function fitted(loss, teacher, share = 0.5) {
  const starts = [8, 16, 25].map((centre) => [centre, 1]);
  const { x, f } = leastOf(([centre, width]) => LOSSES[loss](teacher, bump(centre, width), share), starts);
  return { centre: x[0], logWidth: x[1], value: f, law: bump(...x) };
}

/** Small random numbers that a seed gives again (mulberry32). */
function randomFrom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}
