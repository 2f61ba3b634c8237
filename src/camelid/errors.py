"""The one exception that the command line shows without a traceback."""


class UserError(ValueError):
    """Something the user can mend: what is wrong, and the way out, one line each."""

    def __init__(self, problem: str, advice: str):
        super().__init__(f"{problem}\n{advice}")
        self.problem = problem
        self.advice = advice

    def __reduce__(self):
        # Exceptions are pickled by their args, and this one's is its text: worker processes raise it here.
        return type(self), (self.problem, self.advice)
