/* Of a test that runs: asks for new numbers each second and puts them into the page. Nothing is sent but the question. */
(() => {
  "use strict";
  const EVERY_MS = 1000, LOST_AFTER = 5;
  const { charts, renew } = window.report;
  const shape = (all) => JSON.stringify(all.map((c) => [c.title, c.lines.map((l) => l.name)]));
  const say = document.getElementById("say"), names = (all) => all.map(([name]) => name).join();
  const values = [...document.querySelectorAll("#facts dd")];
  const shown = shape(charts);
  let facts = null, failed = 0;
  const look = async () => {
    let over = false;
    try {
      const answer = await fetch("live.json", { cache: "no-store", signal: AbortSignal.timeout(10000) });
      if (!answer.ok) throw new Error(answer.statusText);
      const now = await answer.json();
      failed = 0;
      over = now.over;
      // another test, or a line more: the page is made anew
      if (shape(now.charts) !== shown || names(now.facts) !== (facts ??= names(now.facts))) return location.reload();
      say.textContent = now.say;
      now.facts.forEach(([, value], k) => { values[k].textContent = value; });
      renew(now.charts);
    } catch {
      if (++failed >= LOST_AFTER) say.textContent = "Gone: the test has ended, or the way to it is cut. harness report has its figures.";
    }
    setTimeout(look, EVERY_MS * (over || failed >= LOST_AFTER ? 5 : 1));
  };
  setTimeout(look, EVERY_MS);
})();
