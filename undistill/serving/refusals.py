"""`Refusal`: an answer of the server that is an error, with its sentence."""


class Refusal(Exception):
    """Ends a request with a status of HTTP and a sentence for whoever asked."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers
