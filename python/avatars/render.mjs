// Draws avatars: for each line "STYLE SPLIT INDEX" of standard input the raw pixels (S, S, 3) on standard output.
// Started by render.py, which says which, and where they go:  node render.mjs SIZE
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import * as collection from '@dicebear/collection';
import { createAvatar } from '@dicebear/core';
import { Resvg } from '@resvg/resvg-js';

const size = Number(process.argv[2]);
const heldOut = 0.1; // of all portraits of a style
const backgroundColor = ['b6e3f4', 'c0aede', 'd1d4f9', 'ffd5dc', 'ffdfbf'];
const camelCase = (style) => style.replace(/-(.)/g, (_, letter) => letter.toUpperCase());

// Some styles have but a thousand portraits, so that seeds repeat them: a portrait's own hash says which split has it.
const splitOf = (svg) =>
  createHash('sha256').update(svg).digest().readUInt32BE() < heldOut * 2 ** 32 ? 'val' : 'train';

function portrait(style, split, index) {
  for (let attempt = 0; ; attempt++) {
    const seed = `${split}-${index}-${attempt}`;
    const svg = createAvatar(collection[camelCase(style)], { seed, backgroundColor }).toString();
    if (splitOf(svg) === split) return svg;
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const options = { fitTo: { mode: 'width', value: size }, font: { loadSystemFonts: false } };
  const { pixels } = new Resvg(portrait(...line.split(' ')), options).render(); // RGBA; a getter that copies
  const rgb = pixels.filter((_, i) => i % 4 !== 3);
  if (!process.stdout.write(rgb)) await once(process.stdout, 'drain');
}
