"""/tokenize, /detokenize, /tokenizer_info: the model's own tokenizer over HTTP."""

from typing import Any

from fastapi import APIRouter

from qoq.api.checks import refuse_unsupported
from qoq.api.protocol import DetokenizeRequest, TokenizeRequest
from qoq.server.context import Context


def routes(context: Context) -> APIRouter:
    """The routes, bound to what they serve."""
    router = APIRouter(tags=["tokenizer"])
    prompts = context.prompts
    tokenizer = context.model.tokenizer

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Ids of a prompt, or of a conversation through the chat template."""
        context.check_model(body.model)
        refuse_unsupported(body)
        if body.messages is not None:
            text = await prompts.render(
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                tools=body.tools,
                template=body.chat_template,
                variables=body.chat_template_kwargs,
            )
            special = bool(body.add_special_tokens)
        else:
            text = body.prompt or ""
            special = body.add_special_tokens is not False
        ids = await prompts.encode(text, special=special)
        names = tokenizer.hf.convert_ids_to_tokens(ids) if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": context.model.max_model_len,
            "tokens": ids,
            "token_strs": names,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """Text of ids, special tokens shown."""
        context.check_model(body.model)
        prompts.check_ids(body.tokens, "tokens")
        return {"prompt": await prompts.decode(body.tokens, special=True)}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What the tokenizer is: class, vocabulary, special tokens, chat template."""
        hf = tokenizer.hf
        return {
            "tokenizer_class": type(hf).__name__,
            "vocab_size": len(tokenizer),
            "model_max_length": context.model.max_model_len,
            **{name: str(token) for name, token in hf.special_tokens_map.items()},
            "eos_token_ids": list(tokenizer.eos_ids),
            "chat_template": None
            if context.model.template is None
            else context.model.template.source,
        }

    return router
