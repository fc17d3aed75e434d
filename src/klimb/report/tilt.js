// The target p = ref exp(r / beta) / Z seen through draws of ref: what klimb.numbers.tilt computes, in the page.
// P prompts, G draws a prompt, rewards a flat array of P G numbers. Nats; reward in its own units.
"use strict";

const MARGIN = 2.5; // nats that log G must exceed the KL by; also where the jackknife is sound

/** One prompt at one beta: reward E_p[r], kl, logZ, ess, and the weights s of its draws, which sum to one. */
function tiltPrompt(rewards, start, G, beta, weights) {
  let top = -Infinity;
  for (let i = start; i < start + G; i++) if (rewards[i] > top) top = rewards[i];
  if (top === -Infinity) {
    weights.fill(0, start, start + G);
    return { reward: -Infinity, kl: Infinity, logZ: -Infinity, ess: 0, allowed: false };
  }
  let total = 0;
  for (let i = start; i < start + G; i++) total += weights[i] = Math.exp((rewards[i] - top) / beta);
  const logSum = Math.log(total); // of exp((r - top) / beta)
  let entropy = 0, mean = 0, squares = 0, low = Infinity;
  for (let i = start; i < start + G; i++) {
    const s = (weights[i] /= total);
    if (s === 0) continue;
    entropy -= s * ((rewards[i] - top) / beta - logSum);
    mean += s * rewards[i];
    squares += s * s;
    if (rewards[i] < low) low = rewards[i];
  }
  let reward = mean, kl = Math.log(G) - entropy, logZ = top / beta + logSum - Math.log(G);
  if (entropy >= MARGIN) { // the jackknife, as in klimb.numbers.tilt
    let logs = 0, moved = 0;
    for (let i = start; i < start + G; i++) {
      const s = weights[i];
      logs += Math.log1p(-s);
      if (s > 0) moved += (s * (mean - rewards[i])) / (1 - s);
    }
    const logShift = -(G - 1) * (Math.log(G / (G - 1)) + logs / G);
    const meanShift = (-(G - 1) * moved) / G;
    logZ += logShift;
    reward += meanShift;
    kl += meanShift / beta - logShift;
  }
  return {
    reward: Math.min(Math.max(reward, low), top),
    kl: Math.max(kl, 0),
    logZ: Math.min(logZ, top / beta),
    ess: 1 / squares,
    allowed: true,
  };
}

/** All prompts at one beta: means over those that are not forbidden, each prompt, and the weights [P G]. */
function tilt(rewards, G, beta, weights = new Float64Array(rewards.length)) {
  const prompts = [];
  for (let start = 0; start < rewards.length; start += G) prompts.push(tiltPrompt(rewards, start, G, beta, weights));
  const known = prompts.filter((prompt) => prompt.allowed);
  const mean = (name) => known.reduce((sum, prompt) => sum + prompt[name], 0) / known.length;
  return { reward: mean("reward"), kl: mean("kl"), logZ: mean("logZ"), ess: mean("ess"), prompts, weights };
}

/** Linear in log beta between the points of a grid of falling betas; the ends beyond it. */
function between(betas, values, beta) {
  if (beta >= betas[0]) return values[0];
  for (let i = 1; i < betas.length; i++) {
    if (beta >= betas[i]) {
      const share = Math.log(betas[i - 1] / beta) / Math.log(betas[i - 1] / betas[i]);
      return values[i - 1] + share * (values[i] - values[i - 1]);
    }
  }
  return values[values.length - 1];
}

/** How the rewards spread over equal bins, under ref and under p: shares that each sum to one. */
function histogram(rewards, weights, G, edges) {
  const bins = edges.length - 1, ref = new Float64Array(bins), p = new Float64Array(bins);
  const low = edges[0], width = edges[bins] - low;
  let draws = 0, mass = 0;
  for (let i = 0; i < rewards.length; i++) {
    if (rewards[i] === -Infinity) continue;
    const bin = Math.min(Math.max(Math.floor((bins * (rewards[i] - low)) / width), 0), bins - 1);
    ref[bin] += 1;
    p[bin] += weights[i];
    draws += 1;
    mass += weights[i];
  }
  return { ref: ref.map((x) => x / draws), p: p.map((x) => x / mass) };
}

/** A Float32Array from its bytes in base64. */
function floats(base64) {
  return new Float32Array(Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);
}
