// A page that is served while its run goes on: asks every two seconds whether there is news, and changes only the parts
// that have changed, so that the place one reads at stays where it is.
"use strict";
(() => {
  const EVERY = 2000;  // milliseconds
  const parts = (page) => [...page.querySelectorAll("#head, nav, main > section, main > script, footer")];
  const key = (part) => part.id || part.localName;
  let known = new Map(parts(document).map((part) => [key(part), part.innerHTML]));
  let tag = null;
  const live = document.createElement("p");
  live.className = "lead live";
  live.setAttribute("role", "status");
  const tell = (text) => { if (live.textContent !== text) live.textContent = text; };

  const anchor = () => {
    const seen = [...document.querySelectorAll("main > section")].find((part) => part.getBoundingClientRect().bottom > 80);
    return seen && window.scrollY > 0 ? [seen.id, seen.getBoundingClientRect().top] : null;
  };
  const back = (place) => {
    const part = place && document.getElementById(place[0]);
    if (part) window.scrollBy({ top: part.getBoundingClientRect().top - place[1], behavior: "instant" });
  };
  const opened = (part) => [...part.querySelectorAll("details[open] > summary")].map((summary) => summary.textContent);
  const renew = (old, fresh) => {
    const open = opened(old);
    const copy = document.importNode(fresh, true);
    old.replaceWith(copy);
    for (const summary of copy.querySelectorAll("details > summary")) {
      if (open.includes(summary.textContent)) summary.parentElement.open = true;
    }
  };
  const take = (text) => {
    const page = new DOMParser().parseFromString(text, "text/html");
    const fresh = parts(page);
    const place = anchor();
    const same = fresh.length === known.size && fresh.every((part) => known.has(key(part)));
    if (same) {
      for (const part of fresh) {
        if (known.get(key(part)) === part.innerHTML) continue;
        const old = parts(document).find((other) => key(other) === key(part));
        renew(old, part);
      }
    } else {
      for (const selector of ["#head", "nav", "main", "footer"]) {
        const [old, now] = [document.querySelector(selector), page.querySelector(selector)];
        if (old && now) renew(old, now);
        else if (now) document.querySelector("header").after(document.importNode(now, true));
      }
    }
    known = new Map(fresh.map((part) => [key(part), part.innerHTML]));
    document.title = page.title;
    document.dispatchEvent(new Event("boxwright-renewed"));
    back(place);
  };
  const ask = async () => {
    try {
      const answer = await fetch("/", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.status === 200 && !document.querySelector("dialog[open]")) {
        const text = await answer.text();
        tag = answer.headers.get("ETag");
        take(text);
        tell(`Live: last news at ${new Date().toLocaleTimeString()}`);
      } else if (answer.status !== 200 && answer.status !== 304) {
        tell(`Live: ${(await answer.text()).slice(0, 200)}`);
      } else if (!live.textContent.startsWith("Live: last")) {
        tell("Live: no news yet");
      }
    } catch {
      tell("Live: boxwright report --watch has stopped, this is the last that it told");
    }
    setTimeout(ask, EVERY);
  };
  document.querySelector(".title > div").append(live);
  setTimeout(ask, EVERY);
})();
