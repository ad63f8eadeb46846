"""Sentences the simulator answers with, in English and Vietnamese, already cut into the pieces a stream sends. Data,
and no choice.
"""

import re

ENGLISH = (
    "Thanks for the question.",
    "This answer comes from a simulator, so read it for its shape and not for its content.",
    "The short version is that the order was received and is being prepared for delivery.",
    "You can change the address until the parcel leaves the warehouse.",
    "If something looks wrong, reply here and a colleague will take a look.",
    "Refunds usually reach the card within three to five working days.",
    "First, check that the account name matches the one on the invoice.",
    "Then open the settings page and choose the plan that fits the team.",
    "There is no extra charge for switching plans in the middle of a month.",
    "A queue in front of the model keeps a burst from turning into errors.",
    "Caching the long system prompt makes the second request much cheaper than the first.",
    "The log line at the end of each request says who called, what it cost and how long it took.",
    "In most cases a shorter prompt with one good example works better than a long list of rules.",
    "Let me know if you would like the same thing as a table.",
    "Everything else stays as it was.",
    "That is all there is to it.",
)
VIETNAMESE = (
    "Cảm ơn bạn đã đặt câu hỏi.",
    "Câu trả lời này đến từ bộ mô phỏng, nên hãy xem hình thức chứ đừng xem nội dung.",
    "Nói ngắn gọn, đơn hàng đã được tiếp nhận và đang chuẩn bị giao.",
    "Bạn có thể đổi địa chỉ cho đến khi kiện hàng rời kho.",
    "Nếu thấy điều gì chưa đúng, hãy trả lời tại đây để nhân viên kiểm tra giúp bạn.",
    "Tiền hoàn thường về thẻ trong vòng ba đến năm ngày làm việc.",
    "Trước hết, hãy kiểm tra tên tài khoản có trùng với tên trên hóa đơn không.",
    "Sau đó mở trang cài đặt và chọn gói phù hợp với nhóm của bạn.",
    "Đổi gói giữa tháng không mất thêm phí.",
    "Hàng đợi đặt trước mô hình giúp lượng truy cập tăng vọt không biến thành lỗi.",
    "Lưu đệm phần hướng dẫn dài giúp yêu cầu thứ hai rẻ hơn nhiều so với yêu cầu đầu tiên.",
    "Phần còn lại vẫn giữ nguyên như cũ.",
    "Bạn cần thêm điều gì nữa không?",
)
THOUGHTS = (
    "The user wants a direct answer, so I will keep this brief.",
    "Let me check what was said before and what is still open.",
    "A short reply with one concrete next step should be enough.",
)

PIECE_CHARS_MAX = 16

_PIECE = re.compile(rf"\s*\S{{1,{PIECE_CHARS_MAX}}}|\s+")


def pieces(text: str) -> list[str]:
    """The text in stream-sized pieces: words with the space before them, long words cut."""
    return _PIECE.findall(text)


ENGLISH_PIECES = tuple(tuple(pieces(" " + sentence)) for sentence in ENGLISH)
VIETNAMESE_PIECES = tuple(tuple(pieces(" " + sentence)) for sentence in VIETNAMESE)
THOUGHT_PIECES = tuple(tuple(pieces(" " + sentence)) for sentence in THOUGHTS)
