// Shows the value of a point under the pointer, under a finger, or when the point has the keyboard's focus.
"use strict";
const tip = document.getElementById("tip");
let shown = null;
function show(point) {
  shown = point;
  tip.textContent = point.dataset.value;
  const place = point.getBoundingClientRect();
  const left = place.left + place.width / 2 - tip.offsetWidth / 2;
  tip.style.left = Math.max(4, Math.min(left, innerWidth - tip.offsetWidth - 4)) + "px";
  const above = place.top - tip.offsetHeight - 8;
  tip.style.top = (above > 0 ? above : place.bottom + 8) + "px";
  tip.style.visibility = "visible";
}
function hide() {
  shown = null;
  tip.style.visibility = "hidden";
}
for (const point of document.querySelectorAll(".value")) {
  for (const name of ["pointerenter", "focus", "click"]) point.addEventListener(name, () => show(point));
  for (const name of ["pointerleave", "blur"]) point.addEventListener(name, hide);
}
for (const name of ["scroll", "resize"]) addEventListener(name, () => shown && show(shown), { passive: true });
