"use strict";
// Tabs; plots, which are drawn when their tab is first seen, in the colors of the page; a legend that
// fades the curves of other settings.
(() => {
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  const standIns = JSON.parse(document.getElementById("stand-ins").textContent);
  const legend = [...document.querySelectorAll("[data-setting]")];
  const drawn = new Map();

  function colored(text) {
    const style = getComputedStyle(document.documentElement);
    for (const [variable, color] of Object.entries(standIns)) {
      text = text.replaceAll(color, style.getPropertyValue(variable).trim());
    }
    return text;
  }

  async function draw(place) {
    if (drawn.has(place)) return;
    const name = place.id.slice("plot-".length);
    const source = document.querySelector(`script[data-plot="${name}"]`);
    drawn.set(place, null);
    drawn.set(place, await Bokeh.embed.embed_item(JSON.parse(colored(source.textContent)), place.id));
    fade();
  }

  // Bokeh draws what is not selected faintly, and everything in full if nothing is selected
  function fade() {
    const chosen = new Set(legend.filter((one) => one.ariaPressed === "true").map((one) => one.dataset.setting));
    for (const view of [...drawn.values()].flatMap((views) => views ? [...views.roots] : [])) {
      for (const { data_source: source } of view.model.renderers ?? []) {
        const settings = [...(source.get_column("setting") ?? [])];
        source.selected.indices = settings.flatMap((setting, row) => chosen.has(setting) ? [row] : []);
      }
    }
  }

  function show(tab) {
    for (const other of tabs) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", String(chosen));
      other.tabIndex = chosen ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
    }
    document.querySelectorAll("section:not([hidden]) .plot").forEach(draw);
  }

  for (const [number, tab] of tabs.entries()) {
    tab.addEventListener("click", () => show(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step === undefined) return;
      const next = tabs[(number + step + tabs.length) % tabs.length];
      next.focus();
      show(next);
    });
  }

  for (const one of legend) {
    one.addEventListener("click", () => {
      one.setAttribute("aria-pressed", String(one.ariaPressed !== "true"));
      fade();
    });
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const [place, views] of drawn) {
      if (views) views.roots.forEach((view) => view.model.document?.clear());
      place.replaceChildren();
    }
    drawn.clear();
    document.querySelectorAll("section:not([hidden]) .plot").forEach(draw);
  });

  show(tabs[0]); // a page without tabs shows all it has
})();
