"""Is my operator, method or gradient matrix right? One call says, and says what is wrong.

Each check raises an AssertionError that names the property that failed, the value measured, the
value allowed and the likely cause; it returns None where all is well.
"""

from .gradients import check_gradients as check_gradients
from .method import check_method as check_method
from .operator import check_operator as check_operator
