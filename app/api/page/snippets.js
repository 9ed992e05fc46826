// The same request as a program would send it: curl, Python with requests, and the official OpenAI client.

import { connection } from "./api.js";

const OPENAI_FIELDS = ["prompt", "n", "size", "model"]; // arguments of the client; the others go into extra_body

/** `fields` are those of the form; `edit` says which files go with them, as {images, mask}, or is null. */
export function snippet(kind, fields, edit) {
  const base = new URL(".", location.href).href.replace(/\/$/, "");
  return { curl, python, openai }[kind](base, fields, edit);
}

function curl(base, fields, edit) {
  const key = connection.keyed ? ` -H "Authorization: Bearer $IMAGINE_API_KEY"` : "";
  if (edit) {
    const parts = [
      ...files(edit).map(([name, file]) => `     -F ${quoted(`${name}=@${file}`)}`),
      ...pairs(fields).map((pair) => `     --form-string ${quoted(pair)}`), // -F would open a file for an "@"
    ];
    return [`curl ${base}/v1/images/edits${key}`, ...parts].join(" \\\n");
  }
  return (
    `curl ${base}/v1/images/generations${key} \\\n` +
    `     -H 'Content-Type: application/json' \\\n     -d ${quoted(JSON.stringify(fields))}`
  );
}

function python(base, fields, edit) {
  const key = connection.keyed;
  const lines = ["import base64", ...(key ? ["import os"] : []), "", "import requests", ""];
  lines.push(`answer = requests.post(`);
  if (edit) {
    const parts = files(edit).map(([name, file]) => `        ("${name}", ${opened(file)}),`);
    lines.push(`    "${base}/v1/images/edits",`, "    files=[", ...parts, "    ],", `    data=${dict(fields)},`);
  } else {
    lines.push(`    "${base}/v1/images/generations",`, `    json=${dict(fields)},`);
  }
  if (key) lines.push(`    headers={"Authorization": f"Bearer {os.environ['IMAGINE_API_KEY']}"},`);
  lines.push(")", "answer.raise_for_status()", ...save('picture["b64_json"]', 'answer.json()["data"]'));
  return lines.join("\n");
}

function openai(base, fields, edit) {
  const key = connection.keyed ? `os.environ["IMAGINE_API_KEY"]` : `"any"`;
  const known = Object.entries(fields).filter(([name]) => OPENAI_FIELDS.includes(name));
  const extra = Object.fromEntries(Object.entries(fields).filter(([name]) => !OPENAI_FIELDS.includes(name)));
  const parameters = [
    ...(edit ? openedFiles(edit).map((argument) => `    ${argument},`) : []),
    ...known.map(([name, value]) => `    ${name}=${literal(value)},`),
    ...(Object.keys(extra).length ? [`    extra_body=${dict(extra)},`] : []),
  ];
  return [
    "import base64",
    ...(connection.keyed ? ["import os"] : []),
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${base}/v1", api_key=${key})`,
    `answer = client.images.${edit ? "edit" : "generate"}(`,
    ...parameters,
    ")",
    ...save("picture.b64_json", "answer.data"),
  ].join("\n");
}

function save(content, data) {
  return [
    `for number, picture in enumerate(${data}):`,
    `    with open(f"picture-{number}.png", "wb") as file:`,
    `        file.write(base64.b64decode(${content}))`,
  ];
}

/** Arguments of the OpenAI client, which takes one image or a list of them. */
function openedFiles({ images, mask }) {
  const image = images.length > 1 ? `[${images.map(opened).join(", ")}]` : opened(images[0]);
  return [`image=${image}`, ...(mask ? [`mask=${opened(mask)}`] : [])];
}

const files = ({ images, mask }) => [...images.map((image) => ["image", image]), ...(mask ? [["mask", mask]] : [])];
const opened = (file) => `open(${literal(file)}, "rb")`;
const pairs = (fields) => Object.entries(fields).map(([name, value]) => `${name}=${value}`);
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`; // for a shell
const literal = (value) => JSON.stringify(value); // numbers and strings are the same in Python

function dict(fields) {
  return `{${Object.entries(fields)
    .map(([name, value]) => `"${name}": ${literal(value)}`)
    .join(", ")}}`;
}
