// Talks to the server: answers as streams of pieces, errors as sentences.

const at = (path) => new URL(path, document.baseURI).href;

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // 0: no server answered
  }
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function ask(path, options) {
  let response;
  try {
    response = await fetch(at(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
  if (!response.ok) throw new ApiError(reason(await response.text(), response.status), response.status);
  return response;
}

function reason(text, status) {
  try {
    const body = JSON.parse(text);
    const error = body.error ?? body.detail ?? body;
    const message = typeof error === "string" ? error : error.message;
    if (message) return String(message);
  } catch { /* no JSON: the text itself is the reason */ }
  return text.trim().slice(0, 300) || `The server answers with status ${status}.`;
}

export async function getJson(path, key) {
  return (await ask(path, { headers: headers(key), cache: "no-store" })).json();
}

export async function getText(path, key) {
  return (await ask(path, { headers: headers(key), cache: "no-store" })).text();
}

// Yields {text, finish, usage}; throws ApiError, or AbortError once `signal` is aborted.
export async function* stream(path, body, key, signal) {
  const response = await ask(path, {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  let done = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        done = true;
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message ?? String(chunk.error), 500);
      const choice = chunk.choices?.[0];
      yield {
        text: choice?.text ?? choice?.delta?.content ?? "",
        finish: choice?.finish_reason ?? null,
        usage: chunk.usage ?? null,
      };
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke in the middle of the answer.", 0);
  }
  if (!done) throw new ApiError("The connection ended in the middle of the answer.", 0);
}

// The data of server-sent events. Lines end at line feeds alone: a text may hold other line ends.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // leaving early hangs up
  }
}
