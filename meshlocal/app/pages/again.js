"use strict";
// What the page shows changes: it is asked for again every few seconds, and what is new put in place, without a reload.
const SECONDS = Number(document.currentScript.dataset.seconds);
const state = document.getElementById("state");
const PATIENCE = 5000;
// Said once: who has it read to them need not hear it every other second.
const tell = (text) => { if (state.textContent !== text) state.textContent = text; };
const named = (each) => each.getAttribute("aria-label") || each.getAttribute("href");

const put = (text) => {
  const fresh = new DOMParser().parseFromString(text, "text/html").querySelector("main");
  const old = document.querySelector("main");
  if (!fresh || fresh.innerHTML === old.innerHTML) return;
  const focus = old.contains(document.activeElement) ? named(document.activeElement) : null;
  const scrolled = new Map([...old.querySelectorAll(".wide")].map((each) => [named(each), each.scrollLeft]));
  old.replaceChildren(...fresh.childNodes);
  old.querySelectorAll(".wide").forEach((each) => { each.scrollLeft = scrolled.get(named(each)) || 0; });
  if (focus) [...old.querySelectorAll("a, [tabindex]")].find((each) => named(each) === focus)?.focus({preventScroll: true});
};

const ask = async () => {
  if (!document.hidden) {
    try {
      const answer = await fetch(location.pathname, {cache: "no-store", signal: AbortSignal.timeout(PATIENCE)});
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      put(await answer.text());
      tell("live");
    } catch (error) {
      tell(`not heard of since then: ${error.message}`);
    }
  }
  setTimeout(ask, SECONDS * 1000);
};
setTimeout(ask, SECONDS * 1000);
tell("live");
